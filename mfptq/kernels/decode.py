"""Codes and scales to bfloat16 values, and powers of two times them, compiled where LLVM is installed: as `encodings.codes` does it.

This is the CPU's decoder; `decode_cuda.py` has that of GPUs.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..checkpoint.encoding import Bf16Array, CodeScaler, DecodedArray, ScaleArray
from ..encodings.codes import BF16_NORMALS, scale_codes

if TYPE_CHECKING:
    from llvmlite import ir


WIDE = "_F32"  # ends the names of functions that write float32


@cache
def load_decoder() -> CodeScaler:
    """Return the fastest decoder that this installation has."""
    return CompiledDecoder() if importlib.util.find_spec("llvmlite") is not None else scale_codes


def _emit(module: ir.Module, name: str) -> None:
    from .decode_code import emit

    emit(module, name)


def _emit_shift(module: ir.Module, name: str) -> None:
    from .shift_code import emit

    emit(module, name)


class CompiledDecoder:
    """Decodes on the CPU; safe to use from several threads."""

    def __init__(self) -> None:
        from .compiling import CpuFunctions

        pointers, sizes = [ctypes.c_void_p] * 3, [ctypes.c_int64] * 3
        self._functions = CpuFunctions(_emit, [*pointers, *sizes])
        self._shifts = CpuFunctions(_emit_shift, [*pointers[:2], *sizes, pointers[2]])

    def __call__(
        self, codes: str, packed: npt.NDArray[np.uint8], scales: ScaleArray, out: DecodedArray, *, run: int
    ) -> None:
        """Write raw bfloat16 bits, or float32, to `out` `[R, K]`; see `CodeScaler`. All arrays are C-contiguous."""
        rows, columns = out.shape
        places = [array.__array_interface__["data"][0] for array in (packed, scales, out)]
        self._functions[f"decode_{codes}{WIDE if out.dtype == np.float32 else ''}"](*places, rows, columns, run)

    def shift(self, values: Bf16Array, shifts: Bf16Array) -> bool:
        """Add to the bits of values, zeros apart; see `CodeScaler`. All arrays are C-contiguous."""
        rows, columns = values.shape
        result = np.zeros(1, np.uint16)
        places = [array.__array_interface__["data"][0] for array in (values, shifts, result)]
        self._shifts["shift_bf16"](*places[:2], rows, columns, columns if len(shifts) > 1 else 0, places[2])
        return bool(result[0] < BF16_NORMALS)
