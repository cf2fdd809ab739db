"""Source tensors as logical weights: what a linear layer's matrix is, wherever and however it is stored.

A 2-D `<module>.weight` is one weight. A 3-D stack of experts, `<parent>.gate_up_proj [E, 2I, H]` with
`<parent>.down_proj [E, H, I]` (no `.weight` suffix), holds 3E weights: `<parent>.{e}.gate_proj` (the first half of the
rows), `up_proj` (the second half) and `down_proj`. Every weight is contiguous in its tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ..dtypes import DTYPE_BITS
from .header import TensorInfo

WEIGHT_SUFFIX = ".weight"
STACKED_GATE_UP = "gate_up_proj"
STACKED_DOWN = "down_proj"


class Weight(NamedTuple):
    """One linear layer's matrix `[rows, columns]`: `offset` is in bytes from the beginning of the file `shard`."""

    module: str
    shard: str
    dtype: str
    offset: int
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Size in the source, in bytes."""
        return self.size * DTYPE_BITS[self.dtype] // 8

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns


class StoredTensor(NamedTuple):
    """A source tensor with its place: `offset` is in bytes from the beginning of the file `shard`."""

    info: TensorInfo
    shard: str
    offset: int


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


def candidates(tensors: Iterable[StoredTensor]) -> Iterator[Candidate]:
    """Yield each tensor once, in the given order, with the logical weights it holds."""
    stored = {tensor.info.name: tensor for tensor in tensors}
    for name, tensor in stored.items():
        parent, _, leaf = name.rpartition(".")
        if leaf in (STACKED_GATE_UP, STACKED_DOWN) and len(tensor.info.shape) == 3:
            yield _stack(parent, tensor, stored)
        elif not name.endswith(WEIGHT_SUFFIX) or name == WEIGHT_SUFFIX:
            yield Candidate(tensor, (), "not a weight")
        elif len(tensor.info.shape) != 2:
            yield Candidate(tensor, (), f"{len(tensor.info.shape)}-D, not a matrix")
        else:
            rows, columns = tensor.info.shape
            module = name.removesuffix(WEIGHT_SUFFIX)
            yield Candidate(tensor, (Weight(module, tensor.shard, tensor.info.dtype, tensor.offset, rows, columns),))


def _stack(parent: str, tensor: StoredTensor, stored: Mapping[str, StoredTensor]) -> Candidate:
    gate_up, down = stored.get(f"{parent}.{STACKED_GATE_UP}"), stored.get(f"{parent}.{STACKED_DOWN}")
    if gate_up is None or down is None or len(gate_up.info.shape) != 3 or len(down.info.shape) != 3:
        return Candidate(tensor, (), "3-D, but no complete expert stack")
    experts, rows, hidden = gate_up.info.shape
    if down.info.shape != (experts, hidden, rows // 2) or rows % 2 or not experts:
        return Candidate(tensor, (), "3-D, but not stored as [experts, out, in]")
    if tensor is gate_up:
        return Candidate(tensor, tuple(_halves(parent, tensor)))
    return Candidate(tensor, tuple(_slices(parent, tensor)))


def _halves(parent: str, tensor: StoredTensor) -> Iterator[Weight]:
    experts, rows, columns = tensor.info.shape
    half = tensor.info.nbytes // (2 * experts)
    for expert in range(experts):
        for part, leaf in enumerate(("gate_proj", "up_proj")):
            offset = tensor.offset + (2 * expert + part) * half
            yield Weight(f"{parent}.{expert}.{leaf}", tensor.shard, tensor.info.dtype, offset, rows // 2, columns)


def _slices(parent: str, tensor: StoredTensor) -> Iterator[Weight]:
    experts, rows, columns = tensor.info.shape
    step = tensor.info.nbytes // experts
    for expert in range(experts):
        offset = tensor.offset + expert * step
        yield Weight(f"{parent}.{expert}.{STACKED_DOWN}", tensor.shard, tensor.info.dtype, offset, rows, columns)


def name_pattern(module: str, by: str = "*") -> str:
    """Return the kind of a module: its name with every number replaced, so that layers and experts fall together."""
    return ".".join([by if part.isdigit() else part for part in module.split(".")])
