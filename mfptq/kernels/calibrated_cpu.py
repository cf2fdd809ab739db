"""The CPU kernel of the calibrated methods: calls the functions that `cpu_code.py` writes, for whole chunks of 16 rows."""

from __future__ import annotations

from ctypes import c_float

import numpy as np

from ..dtypes import dtype_name
from ..kernels import QuantizeArgs, TileArray
from ..nvfp4 import ByteArray
from .calibrated import FEEDBACK, FUNCTIONS, PreparedStatistics
from .compiling import LONG, Array, CpuFunctions
from .cpu_code import LANES, emit
from .stats import ERROR_FIELDS, ErrorStats

_quantizers = CpuFunctions(emit, [*[Array] * 5, *[LONG] * 3, c_float])


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
        known, found = np.ascontiguousarray(statistics.values), ErrorStats()
        run = _quantizers[f"{FUNCTIONS[args.method]}_{dtype_name(tile)}"]
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
