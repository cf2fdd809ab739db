"""The CPU kernel of the calibrated methods: calls the functions that `cpu_code.py` writes, for whole chunks of 16 rows."""

from __future__ import annotations

import ctypes

import numpy as np

from ..dtypes import dtype_name
from ..kernels import QuantizeArgs, TileArray
from ..nvfp4 import ByteArray
from .calibrated import FUNCTIONS, PreparedStatistics
from .compiling import CpuFunctions
from .cpu import address
from .cpu_code import LANES, emit
from .stats import ERROR_FIELDS, ErrorStats

_quantizers = CpuFunctions(emit, [*[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.c_int64, ctypes.c_float])


class CalibratedCpuKernel:
    """Quantizes on the CPU; safe to use from several threads."""

    name = "cpu"

    def quantize(
        self,
        tile: TileArray,
        args: QuantizeArgs,
        statistics: PreparedStatistics,
        *,
        packed: ByteArray,
        scales: ByteArray,
    ) -> ErrorStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""
        run = _quantizers[f"{FUNCTIONS[args.method]}_{dtype_name(tile)}"]
        values, found = np.ascontiguousarray(statistics.values), ErrorStats()
        whole = len(tile) // LANES * LANES
        if whole:
            stats = np.empty(ERROR_FIELDS)
            arrays = (tile, packed, scales, stats, values)
            run(*map(address, arrays), whole, scales.shape[1], args.global_scale)
            found.add(ErrorStats.from_array(whole * tile.shape[1], stats))
        if whole < len(tile):  # the last rows, filled up to a chunk with zeros, which are taken out of the statistics
            left, stats = len(tile) - whole, np.empty(ERROR_FIELDS)
            rows, nibbles, codes = (np.zeros((LANES, each.shape[1]), each.dtype) for each in (tile, packed, scales))
            rows[:left] = tile[whole:]
            arrays = (rows, nibbles, codes, stats, values)
            run(*map(address, arrays), LANES, scales.shape[1], args.global_scale)
            packed[whole:], scales[whole:] = nibbles[:left], codes[:left]
            stats[-1] -= (LANES - left) * scales.shape[1]
            found.add(ErrorStats.from_array(left * tile.shape[1], stats))
        return found
