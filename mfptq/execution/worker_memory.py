"""What one worker thread owns: a kernel, memory that is used again and again, and a record of where its time went."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np

from ..checkpoint.source import FolderSource
from ..checkpoint.weights import Weight
from ..errors import NonFiniteWeightError, quote
from ..kernels import ERROR_FIELDS, ErrorStats, Float64Array, Kernel, QuantizeArgs, TileArray, WeightBatch
from ..kernels.calibrated import CalibratedKernel, PreparedStatistics
from ..nvfp4 import BLOCK_SIZE, ByteArray, Float32Array, as_float32
from ..planning.jobs import QuantizeWeight
from .bundles import Bundle
from .memory_budget import PARTS
from .tiles import Tile

NUMPY_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


class Memory:
    """Room for a tile of `size` bytes of source data, and for what they become."""

    def __init__(self, kernel: Kernel, size: int) -> None:
        self.source = kernel.allocate(size)
        self.packed = kernel.allocate(size // 4)
        self.scales = kernel.allocate(size // 2 // BLOCK_SIZE)
        self.written: Future[None] | None = None

    def wait(self) -> None:
        """Return when its content is written, or raise what went wrong."""
        if self.written is not None:
            self.written.result()


class WorkerMemory:
    """One worker's memory, for tiles of `tile_bytes`: while parts of it are written, another is filled."""

    def __init__(self, kernel: Kernel, tile_bytes: int, calibrated: CalibratedKernel | None = None) -> None:
        self.kernel = kernel
        self.calibrated = calibrated
        self.tile_bytes = tile_bytes
        self.seconds: dict[str, float] = defaultdict(float)
        self._parts = deque(Memory(kernel, tile_bytes) for _ in range(PARTS))

    @property
    def _now(self) -> Memory:
        return self._parts[0]

    @property
    def memory(self) -> memoryview:
        """Memory for a tile, which is free between tiles."""
        return self._now.source.data

    def hand_over(self, writer: Executor, write: Callable[[], None]) -> None:
        """Have what is in memory written by another thread, and go on with the part that has been written longest.

        What went wrong with an earlier write is raised here, or by `wait_for_writing`.
        """
        self._now.written = writer.submit(write)
        self._parts.rotate(-1)
        with self.timed("write"):
            self._now.wait()

    def wait_for_writing(self) -> None:
        """Return when everything that was handed over is written, or raise what went wrong."""
        for part in self._parts:
            part.wait()

    def timed(self, phase: str) -> Timed:
        """Add the time that the block takes to a phase."""
        return Timed(self.seconds, phase)

    def read(self, source: FolderSource, tile: Tile) -> TileArray:
        """Return a tile's data `[R, K]`, which must fit into the buffer. The next call overwrites it."""
        stretches = [(tile.offset, tile.nbytes)]
        return self._read(source, tile.weight.shard, stretches, tile.weight.dtype).reshape(tile.rows, tile.columns)

    def read_bundle(self, source: FolderSource, bundle: Bundle) -> TileArray:
        """Return the data of many weights, flat, which must fit into the buffer. The next call overwrites it."""
        return self._read(source, bundle.steps[0].weight.shard, bundle.reads, bundle.dtype)

    def _read(self, source: FolderSource, shard: str, stretches: Iterable[tuple[int, int]], dtype: str) -> TileArray:
        with self.timed("read"):
            return self._values(len(self.read_bytes(source, shard, stretches)), dtype)

    def _values(self, nbytes: int, dtype: str) -> TileArray:
        """Return the memory's first bytes as values of a dtype, flat."""
        return self._now.source[:nbytes].view(NUMPY_DTYPES[dtype])

    def read_bytes(self, source: FolderSource, shard: str, stretches: Iterable[tuple[int, int]]) -> memoryview:
        """Return stretches of a file, (offset, size) in bytes, one behind the other. The next call overwrites them."""
        end = 0
        for offset, size in stretches:
            source.read_into(shard, offset, self.memory[end : end + size])
            end += size
        return self.memory[:end]

    def amax(self, source: FolderSource, tile: Tile) -> float:
        """Return the largest magnitude of a tile in its file; raises NonFiniteWeightError for NaN or infinity."""
        weight = tile.weight
        data = self._values(tile.nbytes, weight.dtype).reshape(tile.rows, tile.columns)
        with self.timed("amax"), source.reading(weight.shard, tile.offset, tile.nbytes) as fd:
            found = self.kernel.amax_in_file(fd, tile.offset, data)
        if not math.isfinite(found):
            raise _not_finite(self.read(source, tile).reshape(-1), weight, tile.start)
        return found

    def amax_each(self, data: TileArray, bundle: Bundle) -> Float32Array:
        """Return each weight's largest magnitude; raises NonFiniteWeightError for NaN or infinity."""
        with self.timed("amax"):
            found = self.kernel.amax_each(data, bundle.starts)
        if not np.isfinite(found).all():
            bad = int(np.flatnonzero(~np.isfinite(found))[0])
            raise _not_finite(data[bundle.starts[bad] : bundle.starts[bad + 1]], bundle.steps[bad].weight, 0)
        return found

    def quantize(
        self, data: TileArray, recipe: QuantizeArgs, statistics: PreparedStatistics | None = None, *, start: int = 0
    ) -> Quantized:
        """Return what the tile becomes, minding what is known of its input; it is kept in the buffer from weight `start`."""
        end = start + data.size
        packed = self._now.packed[start // 2 : end // 2].reshape(data.shape[0], -1)
        scales = self._now.scales[start // BLOCK_SIZE : end // BLOCK_SIZE].reshape(data.shape[0], -1)
        with self.timed("quantize"):
            if statistics is None:
                return Quantized(packed, scales, self.kernel.quantize(data, recipe, packed, scales))
            assert self.calibrated is not None
            stats = self.calibrated.quantize(data, recipe, statistics, packed=packed, scales=scales)
            return Quantized(packed, scales, stats)

    def quantize_each(self, data: TileArray, many: WeightBatch) -> QuantizedMany:
        """Return what many weights become."""
        packed, scales = self._now.packed[: data.size // 2], self._now.scales[: data.size // BLOCK_SIZE]
        with self.timed("quantize"):
            return QuantizedMany(packed, scales, self.kernel.quantize_each(data, many, packed, scales))

    def quantize_by(
        self,
        statistics: Callable[[QuantizeWeight], PreparedStatistics | None],
        data: TileArray,
        bundle: Bundle,
        divisors: Float32Array,
    ) -> QuantizedMany:
        """Return what many weights become, minding what is known of each one's input."""
        stats = np.empty((len(bundle.steps), ERROR_FIELDS))
        for row, step in enumerate(bundle.steps):
            start, end = bundle.starts[row : row + 2].tolist()
            tile = data[start:end].reshape(step.weight.rows, step.weight.columns)
            recipe = QuantizeArgs(step.method, float(divisors[row]))
            stats[row] = self.quantize(tile, recipe, statistics(step), start=start).stats.as_array()
        return QuantizedMany(self._now.packed[: data.size // 2], self._now.scales[: data.size // BLOCK_SIZE], stats)


def _not_finite(values: TileArray, weight: Weight, start: int) -> NonFiniteWeightError:
    """Return the error for the first value that is no number, of values that begin at `start` in their weight."""
    bad = int(np.flatnonzero(~np.isfinite(as_float32(values)))[0])
    return NonFiniteWeightError(
        f"{quote(weight.module)} in {quote(weight.shard)} holds {as_float32(values)[bad]} at flat index "
        f"{start + bad}: it cannot be quantized; --ignore it or repair the source"
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
class QuantizedMany:
    """Many quantized weights, flat: packed values and scale codes, one weight behind the other, and their statistics."""

    packed: ByteArray
    scales: ByteArray
    stats: Float64Array
