"""The CPU kernel of the calibrated methods: machine code for whole chunks of 16 rows."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from ..kernels import ERROR_FIELDS, ErrorStats, QuantizeArgs, TileArray
from ..nvfp4 import ByteArray
from .calibrated import Float32Array, PreparedStatistics, lower_factors
from .cpu import KINDS, address
from .machine import LANES, MachineCode

if TYPE_CHECKING:
    from llvmlite import ir

_NAMES = {"weighted": "weighted", "hessian": "hessian", "hessian+": "descent"}


def _quantizer(module: ir.Module, name: str) -> None:
    from .calibrated_code import emit

    emit(module, name)


_quantizers = MachineCode(_quantizer, [*[ctypes.c_void_p] * 7, ctypes.c_int64, ctypes.c_int64, ctypes.c_float])


class CalibratedCpuKernel:
    """Quantizes on the CPU; safe to use from several threads."""

    name = "cpu"

    def quantize(
        self,
        tile: TileArray,
        recipe: QuantizeArgs,
        statistics: PreparedStatistics,
        *,
        packed: ByteArray,
        scales: ByteArray,
    ) -> ErrorStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""
        run = _quantizers[f"{_NAMES[recipe.method]}_{KINDS[tile.dtype.char]}"]
        known = _known(statistics.values)
        places = [address(each) for each in known]
        found = ErrorStats()
        whole = len(tile) // LANES * LANES
        if whole:
            stats = np.empty(ERROR_FIELDS)
            arrays = (tile, packed, scales, stats)
            run(*map(address, arrays), *places, whole, scales.shape[1], recipe.global_scale)
            found.add(ErrorStats.from_array(whole * tile.shape[1], stats))
        if whole < len(tile):
            left, stats = len(tile) - whole, np.empty(ERROR_FIELDS)
            rows, nibbles, codes = (np.zeros((LANES, each.shape[1]), each.dtype) for each in (tile, packed, scales))
            rows[:left] = tile[whole:]
            arrays = (rows, nibbles, codes, stats)
            run(*map(address, arrays), *places, LANES, scales.shape[1], recipe.global_scale)
            packed[whole:], scales[whole:] = nibbles[:left], codes[:left]
            stats[-1] -= (LANES - left) * scales.shape[1]
            found.add(ErrorStats.from_array(left * tile.shape[1], stats))
        return found


def _known(values: Float32Array) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Return weights, Hessians, and their lower factors, all contiguous; what a method does not need is empty."""
    values, empty = np.ascontiguousarray(values), np.empty(0, np.float32)
    if values.ndim == 1:
        return values, empty, empty
    return empty, values, lower_factors(values)
