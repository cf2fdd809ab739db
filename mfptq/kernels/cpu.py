"""The CPU kernel: calls the functions that `cpu_code.py` writes.

Called through `load_kernel`, and by `cuda.py` for what is too small to be sent. Nothing here computes.
"""

from __future__ import annotations

from ctypes import c_float, c_int
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import dtype_name
from ..kernels import Float64Array, Int64Array, Kernel, QuantizeArgs, TileArray, WeightBatch
from ..nvfp4 import BLOCK_SIZE, ByteArray, Float32Array
from .calibrated import FEEDBACK, FUNCTIONS, PreparedStatistics
from .compiling import LONG, Array, CpuFunctions
from .cpu_code import LANES, emit
from .stats import ERROR_FIELDS, ErrorStats

CACHED_BYTES = 2**20  # what is read at once, to be used from the processor's own cache
_quantizers = CpuFunctions(emit, [*[Array] * 6, LONG])
_calibrated = CpuFunctions(emit, [*[Array] * 5, *[LONG] * 3, c_float])
_searchers = CpuFunctions(emit, [*[Array] * 3, LONG])
_file_searchers = CpuFunctions(emit, [Array, LONG, Array, Array, c_int, LONG, LONG])


def _width(data: TileArray) -> int:
    return 8 * data.itemsize


def _bits(data: TileArray) -> npt.DTypeLike:
    return f"u{data.itemsize}"


def _magnitudes(bits: npt.NDArray[Any], dtype: npt.DTypeLike) -> Float32Array:
    """Return the numbers that bits stand for in weights of a dtype."""
    if dtype == np.uint16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(dtype).astype(np.float32)


class CpuKernel(Kernel):
    """Quantizes on the CPU; safe to use from several threads."""

    name = "cpu"
    tile_bytes = 4 * 2**20

    def amax(self, tile: TileArray) -> float:
        """Return the largest magnitude; NaN or infinity anywhere in the tile is returned as such."""
        return float(self.amax_each(tile.reshape(-1), np.array([0, tile.size], np.int64))[0])

    def amax_each(self, data: TileArray, starts: Int64Array) -> Float32Array:
        """Return the largest magnitude of each weight."""
        found = np.empty(len(starts) - 1, _bits(data))
        _searchers[f"amax_{_width(data)}"](data, found, starts, len(found))
        return _magnitudes(found, data.dtype)

    def amax_in_file(self, fd: int, offset: int, tile: TileArray) -> float:
        """Return the largest magnitude of a tile that lies in a file; its memory is overwritten."""
        found, done = np.empty(1, _bits(tile)), np.zeros(1, np.int64)
        room = min(tile.size, CACHED_BYTES // tile.itemsize)
        run = _file_searchers[f"amax_in_file_{_width(tile)}"]
        run(tile, room, found, done, fd, offset, tile.size)
        return float(_magnitudes(found, tile.dtype)[0]) if done[0] else super().amax_in_file(fd, offset, tile)

    def quantize(self, tile: TileArray, args: QuantizeArgs, packed: ByteArray, scales: ByteArray) -> ErrorStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""
        if args.statistics is not None:
            return _quantize_rows(tile, args, args.statistics, (packed, scales))
        starts, factor = np.array([0, tile.size], np.int64), np.array([args.global_scale], np.float32)
        stats = self.quantize_each(tile.reshape(-1), WeightBatch(args.method, starts, factor), packed, scales)
        return ErrorStats.from_array(tile.size, stats[0])

    def quantize_each(self, data: TileArray, batch: WeightBatch, packed: ByteArray, scales: ByteArray) -> Float64Array:
        """Write the packed values and scale codes of many weights, flat; return the statistics `[n, 7]` of each."""
        run = _quantizers[f"{batch.method}_{dtype_name(data)}"]
        stats, blocks = np.empty((len(batch.global_scales), ERROR_FIELDS)), batch.starts // BLOCK_SIZE
        run(data, packed, scales, stats, blocks, batch.global_scales, len(stats))
        return stats


def _quantize_rows(
    tile: TileArray, args: QuantizeArgs, statistics: PreparedStatistics, out: tuple[ByteArray, ByteArray]
) -> ErrorStats:
    """Quantize by a calibrated method, in chunks of 16 rows."""
    (packed, scales), known, found = out, np.ascontiguousarray(statistics.values), ErrorStats()
    run = _calibrated[f"{FUNCTIONS[args.method]}_{dtype_name(tile)}"]
    sizes = scales.shape[1], statistics.rank if args.method == FEEDBACK else 0
    whole = len(tile) // LANES * LANES
    if whole:
        stats = np.empty(ERROR_FIELDS)
        run(tile, packed, scales, stats, known, whole, *sizes, args.global_scale)
        found.add(ErrorStats.from_array(whole * tile.shape[1], stats))
    if whole < len(tile):  # the last rows, filled up to a chunk with zeros, which are taken out of the statistics
        left, stats = len(tile) - whole, np.empty(ERROR_FIELDS)
        rows, nibbles, codes = (np.zeros((LANES, each.shape[1]), each.dtype) for each in (tile, packed, scales))
        rows[:left] = tile[whole:]
        run(rows, nibbles, codes, stats, known, LANES, *sizes, args.global_scale)
        packed[whole:], scales[whole:] = nibbles[:left], codes[:left]
        stats[-1] -= (LANES - left) * scales.shape[1]
        found.add(ErrorStats.from_array(left * tile.shape[1], stats))
    return found
