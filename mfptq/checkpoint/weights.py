"""Find the logical weights in source tensors: what a linear layer's matrix is, wherever and however it is stored.

A 2-D `<module>.weight` is one weight. A 3-D stack of experts, `[experts, out, in]` or, transposed, `[experts, in, out]`,
holds a weight of each expert, or two: `<parent>.gate_up_proj [E, 2I, H]` with `<parent>.down_proj [E, H, I]` (no `.weight`
suffix) holds `<parent>.{e}.gate_proj` (the first half of the rows), `up_proj` (the second half) and `down_proj`. Its parts
lie one expert after the other. What is stored in another way (interleaved, with biases, flat) stays as it is.

Called by `planning.building`, and where an output is compared with its source. Names and shapes alone decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..dtypes import DTYPE_BITS
from ..names.config_sizes import ConfigSizes
from ..names.engine import STACKED, WEIGHT_SUFFIX, experts_module
from ..names.leaves import turned_patterns
from ..names.wrappers import logical

if TYPE_CHECKING:
    from .encoding import Encoding
    from .header import TensorInfo

STACKED_GATE_UP = "gate_up_proj"
STACKED_DOWN = "down_proj"
_BIASES = ("_bias", ".bias")
_NO_SIZES = ConfigSizes()
_TURNED_CODES = "codes of a matrix that is stored transposed, which are not turned"


class Weight(NamedTuple):
    """One linear layer's matrix `[rows, columns]`: `offset` is in bytes from the beginning of the file `shard`.

    `pitch` is 0 for a matrix whose elements follow each other, row after row. One that is stored transposed has the
    elements of a column one behind the other, and `pitch` elements from one column to the next: element `(r, c)` lies
    `r + c * pitch` elements behind `offset`. With an `encoding`, `dtype` is that of the decoded values, `nbytes` their size, and
    only the encoding knows where they lie.
    """

    module: str
    shard: str
    dtype: str
    offset: int
    rows: int
    columns: int
    pitch: int = 0
    encoding: Encoding | None = None

    @property
    def nbytes(self) -> int:
        """Size of its values, in bytes."""
        return self.size * DTYPE_BITS[self.dtype] // 8

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns


class StoredTensor(NamedTuple):
    """A source tensor with its place: `offset` is in bytes from the beginning of the file `shard`.

    With an `encoding`, `info` describes the decoded values, and only the encoding knows where they lie.
    """

    info: TensorInfo
    shard: str
    offset: int
    encoding: Encoding | None = None

    @property
    def matrix(self) -> Weight:
        """The tensor as one matrix, whose rows are all dimensions but the last."""
        *outer, columns = self.info.shape
        place = (self.shard, self.info.dtype, self.offset)
        return Weight(self.info.name, *place, math.prod(outer), columns, encoding=self.encoding)


class Candidate(NamedTuple):
    """A source tensor and the weights it would become; none, and why, where the layout offers no linear weight."""

    tensor: StoredTensor
    weights: tuple[Weight, ...]
    obstacle: str = ""

    @property
    def module(self) -> str:
        """The name that stands for the whole tensor: its module, or its own name if it is no `.weight`."""
        return self.tensor.info.name.removesuffix(WEIGHT_SUFFIX)

    @property
    def is_stack(self) -> bool:
        """Whether the weights are slices of an expert stack."""
        return len(self.weights) > 1 or (bool(self.weights) and self.weights[0].module != self.module)

    @property
    def sample(self) -> tuple[Weight, ...]:
        """The weights of a stack's first expert, which stand for those of all others; of any other tensor, all."""
        return self.weights[: len(STACKED[self.module.rpartition(".")[2]])] if self.is_stack else self.weights


class _Layout(NamedTuple):
    """Names of the stacks of one layer's experts, and the parents that they may have; any, if none is named."""

    gate_up: tuple[str, ...]
    down: str
    parents: tuple[str, ...] = ()


_LAYOUTS = (
    _Layout(("gate_up_proj",), "down_proj"),
    _Layout(("input_linear",), "output_linear", ("block_sparse_moe",)),  # Granite
    _Layout(("gate_proj", "up_proj"), "down_proj", ("moe", "experts")),  # Step-3.5
)


def candidates(tensors: Iterable[StoredTensor], sizes: ConfigSizes = _NO_SIZES) -> Iterator[Candidate]:
    """Yield each tensor once, in the given order, with the logical weights it holds.

    `sizes` are those of config.json: where a stack's shape fits both orientations, its widths decide.
    """
    stored = {tensor.info.name: tensor for tensor in tensors}
    turned = turned_patterns(sizes.model_types)
    for name, tensor in stored.items():
        layouts = _layouts(name) if len(tensor.info.shape) == 3 else []
        if layouts:
            yield _stacked(layouts, tensor, stored, sizes)
        elif not name.endswith(WEIGHT_SUFFIX) or name == WEIGHT_SUFFIX:
            yield Candidate(tensor, (), "not a weight")
        elif len(tensor.info.shape) != 2:
            yield Candidate(tensor, (), f"{len(tensor.info.shape)}-D, not a matrix")
        else:
            yield _matrix(
                tensor, turned=any(regex.match(logical(name.removesuffix(WEIGHT_SUFFIX))) for regex in turned)
            )


def _matrix(tensor: StoredTensor, *, turned: bool) -> Candidate:
    if turned and tensor.encoding is not None:
        return Candidate(tensor, (), _TURNED_CODES)
    rows, columns = tensor.info.shape
    place = (tensor.info.name.removesuffix(WEIGHT_SUFFIX), tensor.shard, tensor.info.dtype, tensor.offset)
    shape = (columns, rows, columns) if turned else (rows, columns, 0)
    weight = Weight(*place, *shape, tensor.encoding)
    return Candidate(tensor, (weight,))


def _layouts(name: str) -> list[_Layout]:
    """Return the layouts of which a tensor of that name may be a part."""
    parent, _, leaf = name.removesuffix(WEIGHT_SUFFIX).rpartition(".")
    owner = logical(parent).rpartition(".")[2]
    if owner.startswith("shared"):
        return []
    return [
        layout
        for layout in _LAYOUTS
        if leaf in (*layout.gate_up, layout.down) and (owner in layout.parents or not layout.parents)
    ]


def _stacked(
    layouts: Iterable[_Layout], tensor: StoredTensor, stored: Mapping[str, StoredTensor], sizes: ConfigSizes
) -> Candidate:
    found = next((found for layout in layouts if (found := _siblings(layout, tensor, stored))), ())
    if not found:
        return Candidate(tensor, (), "3-D, but no complete expert stack")
    if any(f"{name.info.name.removesuffix(WEIGHT_SUFFIX)}{bias}" in stored for name in found for bias in _BIASES):
        return Candidate(tensor, (), "3-D, experts with biases, which engines do not take in NVFP4")
    turns = [turned for turned in (False, True) if _fits([each.info.shape for each in found], turned=turned)]
    if not turns:
        return Candidate(tensor, (), "3-D, but not stored as [experts, out, in]")
    if len(turns) > 1:
        turns = [turned for turned in turns if found[-1].info.shape[2 if turned else 1] in sizes.hidden]
    if len(turns) != 1:
        return Candidate(
            tensor, (), "3-D, and config.json does not tell whether as [experts, out, in] or [experts, in, out]"
        )
    if turns[0] and tensor.encoding is not None:
        return Candidate(tensor, (), _TURNED_CODES)
    return Candidate(tensor, tuple(_parts(tensor, turned=turns[0])))


def _siblings(layout: _Layout, tensor: StoredTensor, stored: Mapping[str, StoredTensor]) -> tuple[StoredTensor, ...]:
    """Return all stacks of a layer's experts, the one of down_proj last; none if they are not complete."""
    module = tensor.info.name.removesuffix(WEIGHT_SUFFIX)
    parent, suffix = module.rpartition(".")[0], tensor.info.name[len(module) :]
    prefix = f"{parent}." if parent else ""
    found = [stored.get(f"{prefix}{leaf}{suffix}") for leaf in (*layout.gate_up, layout.down)]
    complete = [each for each in found if each is not None and len(each.info.shape) == 3]
    return tuple(complete) if len(complete) == len(found) else ()


def _fits(shapes: list[tuple[int, ...]], *, turned: bool) -> bool:
    """Return whether gate and up, and down, are matrices of one expert layer in this orientation."""
    experts, hidden, inner = _turn(shapes[-1], turned=turned)
    rows = inner * (4 - len(shapes))  # gate and up: both halves of one stack, or a stack each
    return experts > 0 and all(_turn(shape, turned=turned) == (experts, rows, hidden) for shape in shapes[:-1])


def _turn(shape: tuple[int, ...], *, turned: bool) -> tuple[int, int, int]:
    experts, rows, columns = shape
    return (experts, columns, rows) if turned else (experts, rows, columns)


def _parts(tensor: StoredTensor, *, turned: bool) -> Iterator[Weight]:
    """Yield the weights of a stack, expert after expert, gate before up."""
    name, dtype = tensor.info.name, tensor.info.dtype
    module, leaf = experts_module(name, tensor.info.shape), name.removesuffix(WEIGHT_SUFFIX).rpartition(".")[2]
    projections = STACKED[leaf]
    experts, all_rows, columns = _turn(tensor.info.shape, turned=turned)
    rows, step = all_rows // len(projections), tensor.info.nbytes // experts
    part = step // columns // len(projections) if turned else step // len(projections)
    for expert in range(experts):
        for number, projection in enumerate(projections):
            offset = tensor.offset + expert * step + number * part
            row = expert * all_rows + number * rows
            encoding = tensor.encoding.from_row(row) if tensor.encoding is not None else None
            place = (tensor.shard, dtype, offset, rows, columns, all_rows if turned else 0)
            yield Weight(f"{module}.{expert}.{projection}", *place, encoding)


def name_pattern(module: str, by: str = "*") -> str:
    """Return a module's name with every number replaced, so that layers and experts fall together."""
    return ".".join([by if part.isdigit() else part for part in module.split(".")])


def layer_pattern(module: str) -> str:
    """Return a module's name with every number but the first replaced: experts fall together, layers do not."""
    parts, seen = module.split("."), False
    for index, part in enumerate(parts):
        if part.isdigit():
            parts[index], seen = "*" if seen else part, True
    return ".".join(parts)
