"""The kernel for NVIDIA GPUs: calls the functions that `ptx.py` writes; copies and kernels of several tiles overlap.

Called through `load_kernel`. Every worker thread has a stream and buffers of its own, host memory is pinned. On the device a
worker holds one tile and what it becomes, never more: where memory is short it takes half a tile at a time. `decode_cuda.py`
builds on the same class.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import c_float, c_int64, c_uint64
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..dtypes import dtype_name
from ..errors import MemoryBudgetError, UsageError, quote
from ..fp8 import Segments
from ..kernels import Float64Array, Int64Array, Kernel, QuantizeArgs, TileArray, WeightBatch
from ..nvfp4 import BLOCK_SIZE, ByteArray, Float32Array
from .cache import cached
from .calibrated import FEEDBACK, FUNCTIONS, PreparedStatistics
from .compiling import ORIGIN
from .cpu import CpuKernel
from .cuda_statistics import DeviceStatistics
from .driver import (
    Device,
    DeviceMemory,
    DeviceMemoryError,
    DeviceRoom,
    DeviceStream,
    DriverError,
    open_device,
)  # fmt: skip
from .stats import ERROR_FIELDS, WORST, ErrorStats

if TYPE_CHECKING:
    from ..checkpoint.encoding import CodeScaler

WARP = 32  # threads
LEAST_SEGMENTS = 256  # each of which is one thread's
THREADS = 256  # of a block
MAX_GRID = 1024  # on every GPU: the statistics are summed in the same order
STATS_BYTES = 8 * ERROR_FIELDS * MAX_GRID * (THREADS // WARP)


class _Lane(threading.local):
    """What one worker thread has on the device: a stream, room for a tile and what it becomes, and statistics."""

    def __init__(self, device: Device) -> None:
        self.stream = DeviceStream(device)
        self.room = DeviceRoom(device)
        self.stats = DeviceMemory(device, STATS_BYTES)
        self.sums: npt.NDArray[np.float64] = device.pinned(STATS_BYTES).view(np.float64)


class CudaWorker:
    """Runs functions on tiles on a GPU; safe to use from several threads, each of which has a lane for each kernel."""

    def __init__(self, device: str) -> None:
        number = int(device.partition(":")[2] or 0)
        self.name = f"cuda:{number}"
        try:
            self._device = open_device(number)
            with self._working("its kernels"):
                load_function(self._device, "amax_16")  # what the driver refuses is refused before any work
                self._lane = _Lane(self._device)
        except DeviceMemoryError:
            raise MemoryBudgetError(f"{self.name} has no memory for a context: use another device") from None
        except DriverError as error:
            raise UsageError(f"device {quote(device)} cannot be used: {error}") from None

    def _parts(self, tile: TileArray, unit: int = BLOCK_SIZE) -> Iterator[tuple[TileArray, list[int]]]:
        """Yield the tile's values, flat, and where they, their packed values and their scales have room on the device.

        All at once, or in halves of whole units where the device has no memory for all.
        """
        assert tile.flags.c_contiguous
        values = tile.reshape(-1)
        size = values.size
        try:
            places = self._room_for(tile.nbytes)
        except DeviceMemoryError:
            size = -(-size // 2 // unit) * unit
            places = self._room_for(size * tile.itemsize)
        for start in range(0, values.size, size):
            yield values[start : start + size], places

    def _room_for(self, size: int) -> list[int]:
        """Return places for `size` bytes of a tile, at least two bytes a weight, and for what they become."""
        return self._lane.room.places(size, size // 4, size // 2 // BLOCK_SIZE)

    def _launch(self, function: str, items: int, threads: int, arguments: tuple[Any, ...]) -> int:
        """Start a kernel with a thread for every item, as far as the grid goes; return how many warps it has.

        Few items take blocks of few `threads`, so that more of the device's processors have some.
        """
        grid = min(MAX_GRID, -(-items // threads))
        self._lane.stream.launch(load_function(self._device, function), grid, threads, arguments)
        return grid * threads // WARP

    def _finish(self, warps: int, weights: int, results: Iterable[tuple[npt.NDArray[Any], int]]) -> ErrorStats:
        """Fetch results, each from its place on the device, and return the statistics of so many weights."""
        stream, sums = self._lane.stream, self._lane.sums[: ERROR_FIELDS * warps]
        for array, place in (*results, (sums, self._lane.stats.pointer)):
            stream.download(array, place)
        stream.wait()
        rows = sums.reshape(ERROR_FIELDS, warps)
        stats = rows.sum(axis=1)
        stats[WORST] = rows[WORST].max() ** 0.5
        return ErrorStats.from_array(weights, stats)

    @contextmanager
    def _working(self, what: str) -> Iterator[None]:
        """Work in the device's context; raise MemoryBudgetError where there is no memory for `what`."""
        with self._device:
            try:
                yield
            except DeviceMemoryError:
                free = _megabytes(self._device.free_memory())
                raise MemoryBudgetError(
                    f"{self.name} ({self._device.name}) has no memory for {what}, {free} of its own are free: "
                    "lower max_workers or max_memory"
                ) from None


class CudaKernel(CudaWorker, Kernel):
    """Quantizes on a GPU; safe to use from several threads."""

    tile_bytes = 8 * 2**20  # larger ones are no faster, and pinning memory takes time

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._small = CpuKernel()
        self._statistics = DeviceStatistics(self._device)

    def allocate(self, size: int) -> ByteArray:
        """Return pinned host memory, from which copies to the device run beside kernels; raises MemoryBudgetError."""
        with self._working(f"{_megabytes(size)} of pinned host memory"):
            return self._device.pinned(size)

    def amax(self, tile: TileArray) -> float:
        """Return the largest magnitude; NaN or infinity anywhere in the tile is returned as such.

        Raises MemoryBudgetError where the device has no memory even for half of the tile.
        """
        with self._working(f"a tile of {_megabytes(tile.nbytes)}"):
            largest = max(self._largest(*part) for part in self._parts(tile))
        if tile.dtype == np.uint16:
            return float(np.uint32(largest << 16).view(np.float32))
        return float(np.array([largest], f"u{tile.itemsize}").view(tile.dtype)[0])

    def quantize(self, tile: TileArray, args: QuantizeArgs, packed: ByteArray, scales: ByteArray) -> ErrorStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite.

        Raises MemoryBudgetError where the device has no memory for the statistics, or even for half of the tile.
        """
        assert packed.flags.c_contiguous
        assert scales.flags.c_contiguous
        function = f"{FUNCTIONS.get(args.method, args.method)}_{dtype_name(tile)}"
        width, by_rows = tile.shape[1] // BLOCK_SIZE, args.method == FEEDBACK  # whose threads take whole rows
        known, lane, stats, done = self._known(args.statistics), self._lane, ErrorStats(), 0
        nibbles, codes = packed.reshape(-1), scales.reshape(-1)
        with self._working(f"a tile of {_megabytes(tile.nbytes)}"):
            for part, places in self._parts(tile, tile.shape[1] if by_rows else BLOCK_SIZE):
                blocks = part.size // BLOCK_SIZE
                arguments = [*map(c_uint64, (*places, lane.stats.pointer))]
                sizes = [c_int64(blocks)]
                if args.statistics is not None:
                    arguments.append(c_uint64(known))
                    sizes += [c_int64(width), c_int64(args.statistics.rank if by_rows else done % width)]
                lane.stream.upload(places[0], part)
                items, threads = (blocks // width, WARP) if by_rows else (blocks, THREADS)
                warps = self._launch(function, items, threads, (*arguments, *sizes, c_float(args.global_scale)))
                out = nibbles[done * BLOCK_SIZE // 2 :][: part.size // 2], codes[done:][:blocks]
                stats.add(self._finish(warps, part.size, zip(out, places[1:], strict=True)))
                done += blocks
        return stats

    def _known(self, statistics: PreparedStatistics | None) -> int:
        """Return where the statistics of a tile's columns lie on the device."""
        if statistics is None:
            return 0
        with self._working("the statistics of an input"):
            return self._statistics.place(statistics, self._lane.stream)

    def amax_each(self, data: TileArray, starts: Int64Array) -> Float32Array:
        """Return the largest magnitude of each of many small weights: the CPU is done before they could be sent."""
        return self._small.amax_each(data, starts)

    def quantize_each(self, data: TileArray, batch: WeightBatch, packed: ByteArray, scales: ByteArray) -> Float64Array:
        """Quantize many small weights, on the CPU, to the same bytes; return the statistics `[n, 7]` of each."""
        return self._small.quantize_each(data, batch, packed, scales)

    @cached_property
    def decoder(self) -> CodeScaler:
        """What decodes stored codes: this device."""
        from .decode_cuda import CudaDecoder

        return CudaDecoder(self.name)

    def quantize_segments(
        self, data: TileArray, segments: Segments, codes: ByteArray
    ) -> tuple[Float32Array, ErrorStats]:
        """Write E4M3 codes of flat values; few segments, and those that the device has no memory for, are the CPU's."""
        count = len(segments.scales)
        if count < LEAST_SEGMENTS:
            return super().quantize_segments(data, segments, codes)
        scales = segments.scales.astype(np.float32)
        given = [np.ascontiguousarray(each) for each in (data, segments.starts, scales, segments.others)]
        lane = self._lane
        with self._working(f"a tile of {_megabytes(data.nbytes)}"):
            try:
                *places, out = lane.room.places(*(each.nbytes for each in given), data.size)
            except DeviceMemoryError:
                return super().quantize_segments(data, segments, codes)
            for place, array in zip(places, given, strict=True):
                lane.stream.upload(place, array)
            source, *others = places
            name = f"fp8_{'exact_' if segments.exact else ''}{dtype_name(data)}"
            arguments = map(c_uint64, (source, out, lane.stats.pointer, *others))
            warps = self._launch(name, count, WARP, (*arguments, c_int64(count)))
            stats = self._finish(warps, data.size, [(codes, out), (scales, places[2])])
        return scales, stats

    def _largest(self, part: TileArray, places: list[int]) -> int:
        """Return the bits of the largest magnitude."""
        lane, words, source = self._lane, part.nbytes // 4, places[0]
        result = lane.sums.view(np.uint32)[:1]
        lane.stream.upload(source, part)
        lane.stream.zero(lane.stats.pointer, result.nbytes)
        arguments = (c_uint64(source), c_int64(words), c_uint64(lane.stats.pointer))
        self._launch(f"amax_{8 * part.itemsize}", words, THREADS, arguments)
        lane.stream.download(result, lane.stats.pointer)
        lane.stream.wait()
        return int(result[0])


def _ptx(name: str) -> bytes:
    """Return a function as PTX: from disk, or compiled now."""

    def compiled() -> bytes:
        from .ptx import compile_ptx

        return compile_ptx(name)

    return cached(f"ptx_{name}", name.encode() + ORIGIN, compiled)


@cache
def load_function(device: Device, name: str) -> int:
    """Return a function on a device, loaded once in a process; called inside `with device:`."""
    return device.load(_ptx(name), name)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
