"""What one worker thread owns: a kernel, memory that is used again and again, and a record of where its time went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from .errors import NonFiniteWeightError, quote
from .files import FolderSource
from .kernels import Kernel, Recipe, TileStats
from .kernels import Tile as TileArray
from .kernels.calibrated import CalibratedKernel, Statistics
from .nvfp4 import GROUP_SIZE, as_float32
from .tiles import Tile

NUMPY_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


class Buffers:
    """One worker's memory: `tile_bytes` of source data, and what they become."""

    def __init__(self, kernel: Kernel, tile_bytes: int, calibrated: CalibratedKernel | None = None) -> None:
        self.kernel = kernel
        self.calibrated = calibrated
        self.tile_bytes = tile_bytes
        self.seconds: dict[str, float] = defaultdict(float)
        self._source = kernel.allocate(tile_bytes)
        self._packed = kernel.allocate(tile_bytes // 4)
        self._scales = kernel.allocate(tile_bytes // 2 // GROUP_SIZE)

    def timed(self, phase: str) -> Timed:
        """Add the time that the block takes to a phase."""
        return Timed(self.seconds, phase)

    def read(self, source: FolderSource, tiles: Sequence[Tile]) -> list[TileArray]:
        """Return each tile's data; together they must fit into the buffer. The next call overwrites them."""
        with self.timed("read"):
            start = 0
            arrays = []
            for shard, offset, size in _runs(tiles):
                source.read_into(shard, offset, self._source.data[start : start + size])
                start += size
            start = 0
            for tile in tiles:
                view = self._source[start : start + tile.nbytes].view(NUMPY_DTYPES[tile.weight.dtype])
                arrays.append(view.reshape(tile.rows, tile.columns))
                start += tile.nbytes
            return arrays

    def amax(self, data: TileArray, tile: Tile) -> float:
        """Return the tile's largest magnitude; raises NonFiniteWeightError for NaN or infinity."""
        with self.timed("amax"):
            found = self.kernel.amax(data)
        if not np.isfinite(found):
            bad = int(np.flatnonzero(~np.isfinite(as_float32(data.reshape(-1))))[0])
            weight = tile.weight
            raise NonFiniteWeightError(
                f"{quote(weight.module)} in {quote(weight.shard)} holds {as_float32(data.reshape(-1))[bad]} at flat index "
                f"{tile.start + bad}: it cannot be quantized; --ignore it or repair the source"
            )
        return found

    def quantize(
        self, data: TileArray, recipe: Recipe, statistics: Statistics | None = None, *, start: int = 0
    ) -> Quantized:
        """Return what the tile becomes, minding what is known of its input; it is kept in the buffer from weight `start`."""
        end = start + data.size
        packed = self._packed[start // 2 : end // 2].reshape(data.shape[0], -1)
        scales = self._scales[start // GROUP_SIZE : end // GROUP_SIZE].reshape(data.shape[0], -1)
        with self.timed("quantize"):
            if statistics is None:
                return Quantized(packed, scales, self.kernel.quantize(data, recipe, packed, scales))
            assert self.calibrated is not None
            stats = self.calibrated.quantize(data, recipe, statistics, packed=packed, scales=scales)
            return Quantized(packed, scales, stats)


class Timed:
    """A block whose time is added to a record."""

    __slots__ = ("_begin", "_phase", "_seconds")

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self._seconds = seconds
        self._phase = phase

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_error: object) -> None:
        self._seconds[self._phase] += time.perf_counter() - self._begin


class Quantized:
    """A quantized tile: uint8 `[R, K/2]` packed values, uint8 `[R, K/16]` scale codes, and what it cost."""

    __slots__ = ("packed", "scales", "stats")

    def __init__(self, packed: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8], stats: TileStats) -> None:
        self.packed = packed
        self.scales = scales
        self.stats = stats


def _runs(tiles: Sequence[Tile]) -> Iterator[tuple[str, int, int]]:
    """Yield (shard, offset, bytes) of each contiguous stretch, so that neighbours are read at once."""
    shard, offset, size = "", 0, 0
    for tile in tiles:
        if size and tile.weight.shard == shard and tile.offset == offset + size:
            size += tile.nbytes
            continue
        if size:
            yield shard, offset, size
        shard, offset, size = tile.weight.shard, tile.offset, tile.nbytes
    if size:
        yield shard, offset, size
