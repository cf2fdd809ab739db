"""The arithmetic of each family of formats, for weights whose fused group shares a scale: one table, keyed by `family`.

Called by `execution.engine` and `execution.prepare`. Formats whose scales belong to rows are converted by `strips`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from ..fp8 import Segments, minmax_scales, search_scales
from ..kernels import ErrorStats, Kernel, QuantizeArgs, TileArray
from ..kernels.calibrated import CALIBRATED_METHODS, CalibratedKernel, PreparedStatistics
from ..kernels.fp8 import quantize_fp8
from ..nvfp4 import BLOCK_SIZE
from ..planning.jobs import QuantizeWeight
from ..storage.partial_file import Piece
from .global_scales import global_scale, scalar

if TYPE_CHECKING:
    from .tiles import Tile
    from .worker_memory import WorkerMemory


class TileWork(NamedTuple):
    """A tile that was read, of a group whose scale is known; `statistics` are those of its input, if its method has any."""

    step: QuantizeWeight
    tile: Tile
    data: TileArray
    scale: float
    statistics: PreparedStatistics | None = None

    def scalars(self) -> Iterator[Piece]:
        """Yield what belongs to the weight as a whole, with its first tile."""
        if self.tile.start == 0 and self.step.input_scale is not None:
            yield Piece(self.step.input_scale.offset, scalar(self.step.input_scale.value))


class Family(Protocol):
    """How a family of formats converts."""

    batched: bool  # whether many small groups are converted in one call

    def scale(self, method: str, amax: float, dtype: str) -> float:
        """Return the scale of a fused group with that largest magnitude."""

    def convert(self, memory: WorkerMemory, work: TileWork) -> tuple[list[Piece], ErrorStats]:
        """Return what a tile becomes, kept in the worker's memory, and what it cost."""

    def try_out(self, method: str, block: TileArray, kernel: Kernel, calibrated: CalibratedKernel | None) -> None:
        """Call the functions that a run will need, for one block of 16."""


class _Nvfp4:
    """Two values to a byte, an E4M3 scale for each 16, and a divisor."""

    batched = True

    def scale(self, method: str, amax: float, dtype: str) -> float:
        return global_scale(method, amax, dtype)

    def convert(self, memory: WorkerMemory, work: TileWork) -> tuple[list[Piece], ErrorStats]:
        step, start = work.step, work.tile.start
        done = memory.quantize(work.data, QuantizeArgs(step.method, work.scale), work.statistics)
        pieces = [
            Piece(step.values + start // 2, done.packed.reshape(-1).data),
            Piece(step.scale + start // BLOCK_SIZE, done.scales.reshape(-1).data),
            *([Piece(step.global_scale, scalar(work.scale))] if start == 0 else []),
            *work.scalars(),
        ]
        return pieces, done.stats

    def try_out(self, method: str, block: TileArray, kernel: Kernel, calibrated: CalibratedKernel | None) -> None:
        packed, scales = np.empty((1, BLOCK_SIZE // 2), np.uint8), np.empty((1, 1), np.uint8)
        if method in CALIBRATED_METHODS and calibrated is not None:
            known = PreparedStatistics.neutral(method, BLOCK_SIZE)
            calibrated.quantize(block, QuantizeArgs(method, 1.0), known, packed=packed, scales=scales)
        else:
            kernel.quantize(block, QuantizeArgs(method, 1.0), packed, scales)


class _Fp8:
    """A value to a byte, and a float32 factor."""

    batched = False

    def scale(self, method: str, amax: float, dtype: str) -> float:
        found = np.array([amax], np.float32)
        return float((minmax_scales(found, dtype) if method == "minmax" else search_scales(found))[0])

    def convert(self, memory: WorkerMemory, work: TileWork) -> tuple[list[Piece], ErrorStats]:
        step, scales = work.step, np.array([work.scale], np.float32)
        whole = np.array([0, work.data.size], np.int64)
        done = memory.quantize_segments(work.data, Segments(whole, scales, scales, step.method == "minmax"))
        pieces = [
            Piece(step.values + work.tile.start, done.codes.data),
            *([Piece(step.scale, scalar(work.scale))] if work.tile.start == 0 else []),
            *work.scalars(),
        ]
        return pieces, done.stats

    def try_out(self, method: str, block: TileArray, kernel: Kernel, calibrated: CalibratedKernel | None) -> None:
        del calibrated
        one, starts = np.ones(1, np.float32), np.array([0, block.size], np.int64)
        kernel.amax_each(block.reshape(-1), starts)
        quantize_fp8(block.reshape(-1), Segments(starts, one, one, method == "minmax"), np.empty(block.size, np.uint8))


FAMILIES: Mapping[str, Family] = {"nvfp4": _Nvfp4(), "fp8": _Fp8()}
