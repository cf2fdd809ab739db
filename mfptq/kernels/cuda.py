"""The kernel for NVIDIA GPUs: copies and kernels of several tiles overlap, and memory is bounded.

Every worker thread has a stream and buffers of its own; host memory is pinned. On the device a worker holds one tile
and what it becomes.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_float, c_int64, c_uint64
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MemoryBudgetError, UsageError, quote
from ..kernels import ERROR_FIELDS, ErrorStats, Float64Array, Int64Array, Kernel, QuantizeArgs, TileArray, WeightBatch
from ..nvfp4 import BLOCK_SIZE, ByteArray, Float32Array
from .artifacts import artifact
from .cpu import CpuKernel
from .driver import Device, DeviceMemory, DeviceMemoryError, DeviceStream, DriverError, open_device
from .machine import origin

THREADS = 256  # of a block
WARPS = THREADS // 32
MAX_GRID = 1024  # on every GPU: the statistics are summed in the same order
STATS_BYTES = 8 * ERROR_FIELDS * MAX_GRID * WARPS
ALIGNMENT = 256  # of what lies in a buffer
KINDS = {"uint16": "bf16", "float16": "f16", "float32": "f32"}
ENTRIES = ("amax_16", "amax_32", *(f"{method}_{kind}" for method in ("search", "minmax") for kind in KINDS.values()))


class _Lane(threading.local):
    """What one worker thread has on the device: a stream, and a buffer that grows to its largest tile.

    `room` is the size of that tile, in bytes; `places` are where it, its packed values and its scales lie.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffer: DeviceMemory | None = None
        self.room = 0
        self.places: tuple[int, int, int] = (0, 0, 0)
        self.stream = DeviceStream(device)
        self.stats = DeviceMemory(device, STATS_BYTES)
        self.sums: npt.NDArray[np.float64] = device.pinned(STATS_BYTES).view(np.float64)

    def reserve(self, size: int) -> None:
        """Have room for a tile of `size` bytes: at least two bytes a weight."""
        if size <= self.room:
            return
        if self._buffer is not None:
            self._buffer.free()  # first: two buffers would be more than what the largest tile needs
        self.room, self._buffer = 0, None
        source, packed, scales = (
            -(-part // ALIGNMENT) * ALIGNMENT for part in (size, size // 4, size // 2 // BLOCK_SIZE)
        )
        self._buffer = DeviceMemory(self._device, source + packed + scales)
        start = self._buffer.pointer
        self.room, self.places = size, (start, start + source, start + source + packed)


class CudaKernel(Kernel):
    """Quantizes on a GPU; safe to use from several threads."""

    tile_bytes = 8 * 2**20  # larger ones are no faster, and pinning memory takes time

    def __init__(self, device: str) -> None:
        found = re.fullmatch("cuda(?::([0-9]{1,4}))?", device)
        if found is None:
            raise UsageError(f"device {quote(device)} is unknown, expected cuda or cuda:N")
        self.name = f"cuda:{int(found[1] or 0)}"
        self._small = CpuKernel()
        try:
            self._device = open_device(int(found[1] or 0))
            with self._working("its kernels"):
                self._functions = _load(self._device)
                self._lane = _Lane(self._device)
        except DeviceMemoryError:
            raise MemoryBudgetError(f"{self.name} has no memory for a context: use another device") from None
        except DriverError as error:
            raise UsageError(f"device {quote(device)} cannot be used: {error}") from None

    def allocate(self, size: int) -> ByteArray:
        """Return pinned host memory, from which copies to the device run beside kernels; raises MemoryBudgetError."""
        with self._working(f"{_megabytes(size)} of pinned host memory"):
            return self._device.pinned(size)

    def amax(self, tile: TileArray) -> float:
        """Return the largest magnitude; NaN or infinity anywhere in the tile is returned as such.

        Raises MemoryBudgetError where the device has no memory even for half of the tile.
        """
        with self._working(f"a tile of {_megabytes(tile.nbytes)}"):
            largest = max(self._largest(part) for part in self._parts(tile))
        if tile.dtype == np.uint16:
            return float(np.uint32(largest << 16).view(np.float32))
        return float(np.array([largest], f"u{tile.itemsize}").view(tile.dtype)[0])

    def quantize(self, tile: TileArray, recipe: QuantizeArgs, packed: ByteArray, scales: ByteArray) -> ErrorStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite.

        Raises MemoryBudgetError where the device has no memory even for half of the tile.
        """
        assert packed.flags.c_contiguous
        assert scales.flags.c_contiguous
        stats, nibbles, codes = ErrorStats(), packed.reshape(-1), scales.reshape(-1)
        with self._working(f"a tile of {_megabytes(tile.nbytes)}"):
            for part in self._parts(tile):
                values, blocks = part.size // 2, part.size // BLOCK_SIZE
                stats.add(self._quantize(part, recipe, nibbles[:values], codes[:blocks]))
                nibbles, codes = nibbles[values:], codes[blocks:]
        return stats

    def amax_each(self, data: TileArray, starts: Int64Array) -> Float32Array:
        """Return the largest magnitude of each of many small weights: the CPU is done before they could be sent."""
        return self._small.amax_each(data, starts)

    def quantize_each(self, data: TileArray, many: WeightBatch, packed: ByteArray, scales: ByteArray) -> Float64Array:
        """Quantize many small weights, on the CPU, to the same bytes; return the statistics `[n, 7]` of each."""
        return self._small.quantize_each(data, many, packed, scales)

    def _parts(self, tile: TileArray) -> Iterator[TileArray]:
        """Yield the tile's values, flat: all at once, or in halves where the device has no memory for all."""
        assert tile.flags.c_contiguous
        lane, values = self._lane, tile.reshape(-1)
        size = values.size
        try:
            lane.reserve(tile.nbytes)
        except DeviceMemoryError:
            size = -(-size // 2 // BLOCK_SIZE) * BLOCK_SIZE
            lane.reserve(size * tile.itemsize)
        for start in range(0, values.size, size):
            yield values[start : start + size]

    def _largest(self, part: TileArray) -> int:
        """Return the bits of the largest magnitude."""
        lane, words = self._lane, part.nbytes // 4
        source, _, _ = lane.places
        result = lane.sums.view(np.uint32)[:1]
        lane.stream.upload(source, part)
        lane.stream.zero(lane.stats.pointer, result.nbytes)
        arguments = (c_uint64(source), c_int64(words), c_uint64(lane.stats.pointer))
        self._launch(f"amax_{8 * part.itemsize}", words, arguments)
        lane.stream.download(result, lane.stats.pointer)
        lane.stream.wait()
        return int(result[0])

    def _quantize(self, part: TileArray, recipe: QuantizeArgs, packed: ByteArray, scales: ByteArray) -> ErrorStats:
        lane, blocks = self._lane, scales.size
        source, nibbles, codes = lane.places
        lane.stream.upload(source, part)
        places = map(c_uint64, (source, nibbles, codes, lane.stats.pointer))
        method = "search" if recipe.method == "search" else "minmax"
        arguments = (*places, c_int64(blocks), c_float(recipe.global_scale))
        grid = self._launch(f"{method}_{KINDS[part.dtype.name]}", blocks, arguments)
        lane.stream.download(packed, nibbles)
        lane.stream.download(scales, codes)
        sums = lane.sums[: ERROR_FIELDS * grid * WARPS]
        lane.stream.download(sums, lane.stats.pointer)
        lane.stream.wait()
        return _together(sums.reshape(ERROR_FIELDS, grid * WARPS), part.size)

    def _launch(self, entry: str, items: int, arguments: tuple[Any, ...]) -> int:
        """Start a kernel with a thread for every item, as far as the grid goes; return the grid's size."""
        grid = min(MAX_GRID, -(-items // THREADS))
        self._lane.stream.launch(self._functions[entry], grid, THREADS, arguments)
        return grid

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


def _ptx() -> bytes:
    """Return the kernels as PTX: from disk, or compiled now."""

    def compiled() -> bytes:
        from .ptx import compile_ptx

        return compile_ptx()

    return artifact("ptx", origin(), compiled)


@cache
def _load(device: Device) -> dict[str, int]:
    """Return the kernels for a device: loaded once in a process."""
    with device:
        return device.load(_ptx(), ENTRIES)


def _together(rows: npt.NDArray[np.float64], weights: int) -> ErrorStats:
    """Return the statistics of all warps."""
    stats = rows.sum(axis=1)
    stats[3] = rows[3].max() ** 0.5
    return ErrorStats.from_array(weights, stats)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
