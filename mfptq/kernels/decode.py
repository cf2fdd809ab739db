"""Codes and scales to bfloat16 values, and powers of two times them, compiled where LLVM is installed: as `encodings.codes` does it.

Called through `Kernel.decoder`, and by `comparison`. This is the CPU's decoder; `decode_cuda.py` has that of GPUs.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from ..checkpoint.encoding import Bf16Array, CodeScaler, DecodedArray, ScaleArray
from ..encodings.codes import BF16_NORMALS, scale_codes
from . import has_compiler

WIDE = "_F32"  # ends the names of functions that write float32


@cache
def load_decoder() -> CodeScaler:
    """Return the fastest decoder that this installation has."""
    return CompiledDecoder() if has_compiler() else scale_codes


class CompiledDecoder:
    """Decodes on the CPU; safe to use from several threads."""

    def __init__(self) -> None:
        from . import decode_code, shift_code  # they need llvmlite
        from .compiling import LONG, Array, CpuFunctions

        self._functions = CpuFunctions(decode_code.emit, [*[Array] * 3, *[LONG] * 3])
        self._shifts = CpuFunctions(shift_code.emit, [Array, Array, *[LONG] * 3, Array])

    def __call__(
        self, codes: str, packed: npt.NDArray[np.uint8], scales: ScaleArray, out: DecodedArray, *, run: int
    ) -> None:
        """Write raw bfloat16 bits, or float32, to `out` `[R, K]`; see `CodeScaler`. All arrays are C-contiguous."""
        rows, columns = out.shape
        decode = self._functions[f"decode_{codes}{WIDE if out.dtype == np.float32 else ''}"]
        decode(packed, scales, out, rows, columns, run)

    def shift(self, values: Bf16Array, shifts: Bf16Array) -> bool:
        """Add to the bits of values, zeros apart; see `CodeScaler`. All arrays are C-contiguous."""
        rows, columns = values.shape
        assert shifts.shape in ((1, columns), (rows, columns))  # compiled code reads what lies there, whatever it is
        result = np.zeros(1, np.uint16)
        distance = columns if len(shifts) > 1 else 0
        self._shifts["shift_bf16"](values, shifts, rows, columns, distance, result)
        return bool(result[0] < BF16_NORMALS)
