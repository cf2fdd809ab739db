"""Hold what one worker thread owns: a kernel, memory that is used again and again, and a record of where its time went.

Called by `execution.conversions`, `execution.engine` and `execution.format_errors`. Nothing here knows of output files or other
workers.
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ..checkpoint.source import Source
from ..checkpoint.weights import Weight
from ..dtypes import DTYPE_BITS, NUMPY_DTYPES
from ..errors import NonFiniteWeightError, quote
from ..fp8 import Candidates, Segments
from ..kernels import ERROR_FIELDS, ErrorStats, Float64Array, Int64Array, Kernel, QuantizeArgs, TileArray, WeightBatch
from ..kernels.calibrated import PreparedStatistics
from ..kernels.fp8 import add_errors
from ..nvfp4 import BLOCK_SIZE, ByteArray, Float32Array, as_float32
from ..planning.jobs import QuantizeWeight
from .memory_budget import buffer_bytes
from .tall_tiles import part_bytes
from .tiles import Batch, Tile, whole
from .transposed import joined, read_transposed

WIDENED_AT_ONCE = 2**17  # elements: temporaries stay small


class WorkerMemory:
    """One worker's kernel and memory: room for a tile of `tile_bytes` bytes of source data, and for what it becomes.

    Threads: one worker's alone. Every call that reads or quantizes overwrites what the call before it returned.
    """

    def __init__(self, source: Source, kernel: Kernel, tile_bytes: int) -> None:
        self.source = source
        self.kernel = kernel
        self._decoder = kernel.decoder
        self.seconds: dict[str, float] = defaultdict(float)
        self._memory = kernel.allocate(buffer_bytes(tile_bytes))
        self._cut(tile_bytes)

    def _cut(self, tile_bytes: int) -> ByteArray:
        """Make room for tiles of so many bytes; return what is left."""
        self.tile_bytes = tile_bytes
        ends = tile_bytes, tile_bytes + tile_bytes // 4, buffer_bytes(tile_bytes)
        self._data, self._packed, self._scales, rest = np.split(self._memory, ends)
        return rest

    @property
    def bytes(self) -> memoryview:
        """The memory for source data, which is free between tiles."""
        return self._data.data

    def timed(self, phase: str) -> Timed:
        """Add the time that the block takes to a phase."""
        return Timed(self.seconds, phase)

    def read(self, tile: Tile) -> TileArray:
        """Return a tile's data `[R, K]`, which must fit into the buffer. The next call overwrites it."""
        read = self._read_transposed if tile.weight.pitch else self._read_at
        return read(tile, 0).reshape(tile.rows, tile.columns)

    def _read_at(self, tile: Tile, start: int) -> TileArray:
        """Return a tile's values, flat, kept in the buffer from element `start` on: as they lie in the file, or decoded."""
        weight = tile.weight
        values = self._values(weight.dtype, tile.size, start)
        if weight.encoding is None:
            with self.timed("read"):
                self.source.read_into(weight.shard, tile.offset, values.view(np.uint8).data)
        else:
            with self.timed("decode"):
                weight.encoding.decode(self.source, tile.region, values, self._decoder)
        return values

    def _read_transposed(self, tile: Tile, start: int) -> TileArray:
        """Return a tile of a matrix that is stored transposed, flat, kept in the buffer from element `start` on."""
        values = self._values(tile.weight.dtype, tile.size, start)
        with self.timed("read"):
            read_transposed(self.source, tile, values, self._packed)
        return values

    def read_batch(self, batch: Batch) -> TileArray:
        """Return the data of many weights, flat, which must fit into the buffer. The next call overwrites it."""
        if batch.is_transposed:
            start = 0
            for weight in joined(step.weight for step in batch.steps):
                start += self._read_transposed(whole(weight), start).size
        elif batch.encoded:
            for step, start in zip(batch.steps, batch.starts.tolist(), strict=False):
                self._read_at(whole(step.weight), start)
        else:
            with self.timed("read"):
                self.read_bytes(batch.steps[0].weight.shard, batch.reads)
        return self._values(batch.dtype, int(batch.starts[-1]))

    def _values(self, dtype: str, size: int, start: int = 0) -> TileArray:
        """Return the buffer for so many values of a dtype, flat, from value `start` on."""
        width = DTYPE_BITS[dtype] // 8
        values: TileArray = self._data[start * width : (start + size) * width].view(NUMPY_DTYPES[dtype])
        return values

    def read_bytes(self, shard: str, ranges: Iterable[tuple[int, int]]) -> memoryview:
        """Return ranges of a file, (offset, size) in bytes, one behind the other. The next call overwrites them."""
        end = 0
        for offset, size in ranges:
            self.source.read_into(shard, offset, self.bytes[end : end + size])
            end += size
        return self.bytes[:end]

    def amax(self, tile: Tile) -> float:
        """Return the largest magnitude of a tile in its file; raises NonFiniteWeightError for NaN or infinity."""
        found = self._amax_in_file(tile)
        if found is None:
            values = self.read(tile)
            with self.timed("amax"):
                found = self.kernel.amax(values)
        if not math.isfinite(found):
            raise _not_finite(self.read(tile).reshape(-1), tile.weight, tile.start)
        return found

    def _amax_in_file(self, tile: Tile) -> float | None:
        """Return the largest magnitude of a tile that lies in a local file just as it is; None for any other."""
        weight = tile.weight
        if weight.pitch or weight.encoding is not None:
            return None
        data = self._values(weight.dtype, tile.size).reshape(tile.rows, tile.columns)
        with self.timed("amax"), self.source.reading(weight.shard, tile.offset, tile.nbytes) as fd:
            return None if fd is None else self.kernel.amax_in_file(fd, tile.offset, data)

    def widen(self, tile: Tile) -> TileArray:
        """Return the decoded values of part of a weight that is kept; raises NonFiniteWeightError for NaN or infinity."""
        values = self.read(tile).reshape(-1)
        for start in range(0, tile.size, WIDENED_AT_ONCE):
            if not np.isfinite(as_float32(values[start : start + WIDENED_AT_ONCE])).all():
                raise _not_finite(values, tile.weight, tile.start)
        return values

    def room(self, tile: Tile) -> tuple[ByteArray, ByteArray]:
        """Return the memory for what a tile becomes in NVFP4, packed values and scales, both flat."""
        return self._packed[: tile.size // 2], self._scales[: tile.size // BLOCK_SIZE]

    def for_parts(self) -> tuple[WorkerMemory, ByteArray]:
        """Return this memory cut anew: for parts of a tall tile, and what is left for its codes."""
        parts = copy.copy(self)
        return parts, parts._cut(part_bytes(self.tile_bytes))

    def checksum(self, tile: Tile, data: TileArray) -> int:
        """Return what a tile's values, as they were read, add to the checksum of its weight."""
        with self.timed("checksum"):
            return tile.checksum(data)

    def checksums(self, batch: Batch, data: TileArray) -> list[int]:
        """Return the checksum of each weight's values, as they were read."""
        with self.timed("checksum"):
            return batch.checksums(data)

    def amax_each(self, data: TileArray, batch: Batch) -> Float32Array:
        """Return each weight's largest magnitude; raises NonFiniteWeightError for NaN or infinity."""
        with self.timed("amax"):
            found = self.kernel.amax_each(data, batch.starts)
        if not np.isfinite(found).all():
            bad = int(np.flatnonzero(~np.isfinite(found))[0])
            raise _not_finite(data[batch.starts[bad] : batch.starts[bad + 1]], batch.steps[bad].weight, 0)
        return found

    def quantize(self, data: TileArray, args: QuantizeArgs, start: int = 0) -> Quantized:
        """Return what the tile becomes; it is kept in the buffer from weight `start` on."""
        end = start + data.size
        packed = self._packed[start // 2 : end // 2].reshape(data.shape[0], -1)
        scales = self._scales[start // BLOCK_SIZE : end // BLOCK_SIZE].reshape(data.shape[0], -1)
        with self.timed("quantize"):
            return Quantized(packed, scales, self.kernel.quantize(data, args, packed, scales))

    def amax_segments(self, data: TileArray, starts: Int64Array, tile: Tile) -> Float32Array:
        """Return the largest magnitude of each segment of a tile; raises NonFiniteWeightError for NaN or infinity."""
        with self.timed("amax"):
            found = self.kernel.amax_each(data.reshape(-1), starts)
        if not np.isfinite(found).all():
            raise _not_finite(data.reshape(-1), tile.weight, tile.start)
        return found

    def add_errors(self, data: TileArray, starts: Int64Array, places: Int64Array, candidates: Candidates) -> None:
        """Add what both scales of each block cost in a tile to the sums of candidates; segment i is of block `places[i]`."""
        with self.timed("quantize"):
            add_errors(data.reshape(-1), starts, places, candidates)

    def quantize_segments(self, data: TileArray, segments: Segments) -> QuantizedSegments:
        """Return what the segments of a tile become; their codes take the place of the tile's values."""
        codes = self._data[: data.size]
        with self.timed("quantize"):
            return QuantizedSegments(codes, *self.kernel.quantize_segments(data.reshape(-1), segments, codes))

    def quantize_each(self, data: TileArray, many: WeightBatch) -> QuantizedMany:
        """Return what many weights become."""
        packed, scales = self._packed[: data.size // 2], self._scales[: data.size // BLOCK_SIZE]
        with self.timed("quantize"):
            return QuantizedMany(packed, scales, self.kernel.quantize_each(data, many, packed, scales))

    def quantize_by(
        self,
        statistics: Callable[[QuantizeWeight], PreparedStatistics | None],
        data: TileArray,
        batch: Batch,
        global_scales: Float32Array,
    ) -> QuantizedMany:
        """Return what many weights become, minding what is known of each one's input."""
        stats = np.empty((len(batch.steps), ERROR_FIELDS))
        for row, step in enumerate(batch.steps):
            start, end = batch.starts[row : row + 2].tolist()
            tile = data[start:end].reshape(step.weight.rows, step.weight.columns)
            args = QuantizeArgs(step.method, float(global_scales[row]), statistics(step))
            stats[row] = self.quantize(tile, args, start).stats.as_array()
        return QuantizedMany(self._packed[: data.size // 2], self._scales[: data.size // BLOCK_SIZE], stats)


def _not_finite(values: TileArray, weight: Weight, start: int) -> NonFiniteWeightError:
    """Return the error for the first value that is no number, of values that begin at `start` in their weight."""
    bad = int(np.flatnonzero(~np.isfinite(as_float32(values)))[0])
    return NonFiniteWeightError(
        f"{quote(weight.module)} in {quote(weight.shard)} holds {as_float32(values)[bad]} at flat index "
        f"{start + bad}: it cannot be quantized: ignore it or repair the source"
    )


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


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized tile: uint8 `[R, K/2]` packed values, uint8 `[R, K/16]` scale codes, and what it cost."""

    packed: ByteArray
    scales: ByteArray
    stats: ErrorStats


@dataclass(frozen=True, slots=True)
class QuantizedSegments:
    """Quantized segments: E4M3 codes, flat, the scale that each was given, and what it cost."""

    codes: ByteArray
    scales: Float32Array
    stats: ErrorStats


@dataclass(frozen=True, slots=True)
class QuantizedMany:
    """Many quantized weights, flat: packed values and scale codes, one weight behind the other, and their statistics."""

    packed: ByteArray
    scales: ByteArray
    stats: Float64Array
