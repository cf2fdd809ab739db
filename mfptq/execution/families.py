"""The arithmetic of each family of formats, for weights whose fused group shares a scale: chosen by `family_of`.

Called by `execution.engine`, `execution.conversions` and `execution.prepare`. Formats whose scales belong to rows are converted
by `conversions.convert_strip`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..fp8 import Candidates, Segments, minmax_scales
from ..kernels import ErrorStats, Kernel, QuantizeArgs, TileArray
from ..kernels.calibrated import CALIBRATED_METHODS, FEEDBACK, PreparedStatistics
from ..kernels.fp8 import add_errors
from ..nvfp4 import BLOCK_SIZE, ByteArray
from ..planning.jobs import CAST, QuantizeWeight
from ..storage.partial_file import Piece
from .cast import cast_blocks, cast_global_scale, largest_scale, read_codes
from .global_scales import global_scale, scalar
from .tall_tiles import tall_tiles
from .tiles import Tile, tiles

if TYPE_CHECKING:
    from ..planning.formats import TargetFormat
    from .worker_memory import WorkerMemory

_TRIED = 256  # segments, as few as a GPU takes


class GroupTile(NamedTuple):
    """A tile of a weight whose fused group has that scale."""

    step: QuantizeWeight
    tile: Tile
    scale: float

    def input_scale(self) -> Iterator[Piece]:
        """Yield the scale of the weight's inputs, with its first tile."""
        if self.tile.start == 0 and self.step.input_scale is not None:
            yield Piece(self.step.input_scale.offset, scalar(self.step.input_scale.value))


class Family(ABC):
    """How a family of formats converts."""

    batched = False  # whether many small groups are converted in one call

    def amax(self, memory: WorkerMemory, tile: Tile) -> float:
        """Return the largest magnitude of a tile, or what else decides the scale of its group: the largest of that."""
        return memory.amax(tile)

    @abstractmethod
    def scale(self, method: str, amax: float, dtype: str) -> float:
        """Return the scale of a fused group with that largest magnitude."""

    def tiles(self, step: QuantizeWeight, tile_bytes: int) -> Iterator[Tile]:
        """Yield a weight in tiles to convert; those that do not fit into so many bytes are converted in parts."""
        return tiles(step.weight, tile_bytes)

    @abstractmethod
    def convert(
        self, memory: WorkerMemory, work: GroupTile, data: TileArray, known: PreparedStatistics | None
    ) -> tuple[list[Piece], ErrorStats]:
        """Return what a tile's values become, kept in the worker's memory, and what it cost; `known` is of its inputs."""

    @abstractmethod
    def try_out(self, method: str, block: TileArray, kernel: Kernel) -> None:
        """Call the functions that a run will need, for one block of 16."""


class _Nvfp4(Family):
    """Two values to a byte, an E4M3 scale for each 16, and a divisor."""

    batched = True

    def scale(self, method: str, amax: float, dtype: str) -> float:
        return global_scale(method, amax, dtype)

    def tiles(self, step: QuantizeWeight, tile_bytes: int) -> Iterator[Tile]:
        cut = tiles if step.method == FEEDBACK else tall_tiles  # FEEDBACK takes all columns at once
        return cut(step.weight, tile_bytes)

    def convert(
        self, memory: WorkerMemory, work: GroupTile, data: TileArray, known: PreparedStatistics | None
    ) -> tuple[list[Piece], ErrorStats]:
        done = memory.quantize(data, QuantizeArgs(work.step.method, work.scale, known))
        return nvfp4_pieces(work, done.packed.reshape(-1), done.scales.reshape(-1)), done.stats

    def try_out(self, method: str, block: TileArray, kernel: Kernel) -> None:
        packed, scales = np.empty((1, BLOCK_SIZE // 2), np.uint8), np.empty((1, 1), np.uint8)
        known = PreparedStatistics.neutral(method, BLOCK_SIZE) if method in CALIBRATED_METHODS else None
        kernel.quantize(block, QuantizeArgs(method, 1.0, known), packed, scales)


def nvfp4_pieces(work: GroupTile, packed: ByteArray, scales: ByteArray) -> list[Piece]:
    """Return where packed values and scale codes of a tile belong, and with the first tile what belongs to the weight."""
    step, start = work.step, work.tile.start
    return [
        Piece(step.values + start // 2, packed.data),
        Piece(step.scale + start // BLOCK_SIZE, scales.data),
        *([Piece(step.global_scale, scalar(work.scale))] if start == 0 else []),
        *work.input_scale(),
    ]


class _Cast(Family):
    """NVFP4 whose codes are those of the source, MXFP4; what is found of a group is its largest block scale."""

    def amax(self, memory: WorkerMemory, tile: Tile) -> float:
        with memory.timed("amax"):
            return largest_scale(memory.source, tile)

    def scale(self, method: str, amax: float, dtype: str) -> float:
        del method, dtype
        return cast_global_scale(amax)

    def convert(
        self, memory: WorkerMemory, work: GroupTile, data: TileArray, known: PreparedStatistics | None
    ) -> tuple[list[Piece], ErrorStats]:
        del data, known
        codes, scales = memory.room(work.tile)
        with memory.timed("read"):
            exponents = read_codes(memory.source, work.tile, codes)
        with memory.timed("quantize"):
            stats = cast_blocks(codes.reshape(-1, BLOCK_SIZE // 2), exponents, work.scale, scales)
        return nvfp4_pieces(work, codes, scales), stats

    def try_out(self, method: str, block: TileArray, kernel: Kernel) -> None:
        """Nothing is compiled for it."""


class _Fp8(Family):
    """A value to a byte, and a float32 factor."""

    def scale(self, method: str, amax: float, dtype: str) -> float:
        """The scale of compressed-tensors by every method: `search` differs in that it rounds once, so it never errs more."""
        del method
        return float(minmax_scales(np.array([amax], np.float32), dtype)[0])

    def convert(
        self, memory: WorkerMemory, work: GroupTile, data: TileArray, known: PreparedStatistics | None
    ) -> tuple[list[Piece], ErrorStats]:
        del known
        step, scales = work.step, np.full(work.tile.rows, work.scale, np.float32)
        rows = np.arange(0, data.size + 1, work.tile.columns, dtype=np.int64)
        done = memory.quantize_segments(data, Segments(rows, scales, scales, step.method == "minmax"))
        pieces = [
            Piece(step.values + work.tile.start, done.codes.data),
            *([Piece(step.scale, scalar(work.scale))] if work.tile.start == 0 else []),
            *work.input_scale(),
        ]
        return pieces, done.stats

    def try_out(self, method: str, block: TileArray, kernel: Kernel) -> None:
        data, ones = np.repeat(block.reshape(-1), _TRIED), np.ones(_TRIED, np.float32)
        starts = np.arange(0, data.size + 1, block.size, dtype=np.int64)
        kernel.amax_each(data, starts)
        add_errors(data, starts, np.zeros(_TRIED, np.int64), Candidates.of(ones, ones))
        codes = np.empty(data.size, np.uint8)
        kernel.quantize_segments(data, Segments(starts, ones, ones, method == "minmax"), codes)


FAMILIES: Mapping[str, Family] = {"nvfp4": _Nvfp4(), "fp8": _Fp8()}
_CAST: Family = _Cast()


def family_of(target: TargetFormat, method: str) -> Family:
    """Return how weights of a format are converted by a method."""
    return _CAST if method == CAST else FAMILIES[target.family]
