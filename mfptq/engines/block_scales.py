"""Find block scales of NVFP4 layers that no sound weight has: NaN, negative, subnormal, or zero where values are not.

Called by `checking.check`. Scales are streamed, one byte for 16 weights; codes are read where a scale is zero, or where there is a
source to compare with; of the source, only rows with a block of zeros. It holds no more than a few tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..checkpoint.folder import Checkpoint
from ..checkpoint.source import Source
from ..checkpoint.stored_bytes import read_bytes
from ..checkpoint.weights import StoredTensor, Weight, candidates
from ..errors import counted
from ..nvfp4 import BLOCK_SIZE
from .findings import Fault, Severity, Text
from .modules import Module, StoredModules

TILE_BYTES = 4 * 2**20  # of scales
LARGEST, SMALLEST_NORMAL, NEGATIVE_ZERO, NAN = 0x7E, 0x08, 0x80, 0x7F
_MAGNITUDES = 0x77  # of two codes in a byte: all but their signs
_SOURCE_DTYPES: Mapping[str, Any] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}

Bytes = npt.NDArray[np.uint8]
Blocks = npt.NDArray[np.bool_]

_NAN = Text("block scales are NaN or negative", "the layer gives NaN or wrong signs", "quantize the layer again")
_SUBNORMAL = Text(
    "block scales are subnormal",
    "some versions of vLLM's Marlin kernels decode them wrongly; others compute right",
    "quantize again with a global scale of the layer's own range, or serve with another kernel",
)
_LOST = Text("block scales are zero, but their codes are not", "the weights of these blocks are lost", "quantize again")
_ZERO = Text(
    "blocks are all zero, but the source's weights are not",
    "the weights of these blocks are lost: they are tiny beside the layer's largest, or the scale is broken",
    "quantize the layer again from the source",
)


class Tile(NamedTuple):
    """Rows of a layer: the codes of their block scales, `[rows, columns / 16]` U8, and where they begin."""

    first: int
    scales: Bytes


@dataclass(slots=True)
class _Kind:
    """One kind of fault: in which modules it is, and in how many blocks of them."""

    code: str
    severity: Severity
    told: Text
    places: dict[str, int] = field(default_factory=dict)

    def add(self, module: str, blocks: int) -> None:
        """Note a number of blocks, if it is not 0."""
        if blocks:
            self.places[module] = self.places.get(module, 0) + blocks

    def faults(self) -> Iterator[Fault]:
        """Yield a fault for each module; all say how many blocks there are."""
        what = f"{self.told.what} ({counted(sum(self.places.values()), 'block', 'blocks')})"
        for place in self.places:
            yield Fault(self.code, self.severity, "", place, what, *self.told[1:])


def block_faults(checkpoint: Checkpoint, held: StoredModules, original: Checkpoint | None = None) -> Iterator[Fault]:
    """Yield what is wrong with the block scales of a checkpoint, with `original`, the source, also blocks that it lost."""
    stored = {tensor.info.name: tensor for tensor in checkpoint.tensors()}
    weights = _plain_weights(original) if original is not None else {}
    broken, subnormal = _Kind("nan-block-scale", "error", _NAN), _Kind("subnormal-block-scale", "warning", _SUBNORMAL)
    lost, zero = _Kind("lost-blocks", "error", _LOST), _Kind("zero-blocks", "warning", _ZERO)
    for module in _nvfp4_modules(held):
        weight = weights.get(module.name)
        for tile in _tiles(checkpoint.source, stored[f"{module.name}.weight_scale"], module):
            _count(tile, module.name, broken, subnormal)
            if weight is None and tile.scales.min() > 0 and NEGATIVE_ZERO not in tile.scales:
                continue
            empty = (tile.scales & NAN) == 0
            codes = _has_codes(checkpoint.source, stored, module, tile)
            lost.add(module.name, int(np.count_nonzero(empty & codes)))
            if weight and original:
                zero.add(module.name, _lost_values(original.source, weight, tile, empty | ~codes))
    for kind in (broken, lost, zero, subnormal):
        yield from kind.faults()


def _nvfp4_modules(held: StoredModules) -> Iterator[Module]:
    """Yield every NVFP4 module under its own name, but for those whose block scales have another form."""
    for module in held.modules.values():
        if module.scheme is not None and module.scheme.format == "nvfp4" and _is_whole(module):
            yield from (module._replace(name=name) for name in module.names)


def _is_whole(module: Module) -> bool:
    scale = module.parts.get("weight_scale")
    return scale is not None and scale.dtype == "F8_E4M3" and scale.shape == (module.rows, module.columns // BLOCK_SIZE)


def _plain_weights(original: Checkpoint) -> dict[str, Weight]:
    """Return the source's matrices by module; those that are stored as codes or transposed are left out."""
    return {
        weight.module: weight
        for item in candidates(original.tensors())
        for weight in item.weights
        if weight.dtype in _SOURCE_DTYPES and not weight.pitch and weight.encoding is None
    }


def _tiles(source: Source, tensor: StoredTensor, module: Module) -> Iterator[Tile]:
    width = module.columns // BLOCK_SIZE
    step = max(1, TILE_BYTES // width)
    for first in range(0, module.rows, step):
        rows = min(step, module.rows - first)
        yield Tile(first, read_bytes(source, tensor, first * width, rows * width).reshape(rows, width))


def _count(tile: Tile, module: str, broken: _Kind, subnormal: _Kind) -> None:
    scales = tile.scales
    if scales.max() <= LARGEST and scales.min() >= SMALLEST_NORMAL:
        return  # by far most tiles: two passes at the speed of memory
    counts = np.bincount(scales.reshape(-1), minlength=256)
    broken.add(module, int(counts[NAN : NAN + 1].sum() + counts[NEGATIVE_ZERO + 1 :].sum()))
    subnormal.add(module, int(counts[1:SMALLEST_NORMAL].sum()))


def _has_codes(source: Source, stored: Mapping[str, StoredTensor], module: Module, tile: Tile) -> Blocks:
    """Return which blocks of a tile have a code that is not zero."""
    name = "weight_packed" if "weight_packed" in module.parts else "weight"
    tensor, rows, width = stored[f"{module.name}.{name}"], tile.scales.shape[0], module.columns // 2
    packed = read_bytes(source, tensor, tile.first * width, rows * width)
    largest: Bytes = (packed.reshape(rows, -1, BLOCK_SIZE // 2) & _MAGNITUDES).max(axis=2)
    return largest > 0


def _lost_values(source: Source, weight: Weight, tile: Tile, zeros: Blocks) -> int:
    """Return how many of the blocks `zeros` of a tile hold something in the source."""
    if weight.rows < tile.first + len(zeros) or weight.columns != zeros.shape[1] * BLOCK_SIZE:
        return 0  # another model's
    dtype, lost = np.dtype(_SOURCE_DTYPES[weight.dtype]), 0
    width = weight.columns * dtype.itemsize
    sign = dtype.type(1 << (8 * dtype.itemsize - 1))
    for row in np.flatnonzero(zeros.any(axis=1)):
        data = read_bytes(source, weight, (tile.first + int(row)) * width, width).view(dtype)
        held = (data.reshape(-1, BLOCK_SIZE) & ~sign).any(axis=1)
        lost += int(np.count_nonzero(held & zeros[row]))
    return lost
