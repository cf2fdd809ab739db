"""The scalar pieces of the CPU kernels, and how they are compiled: once, cached on disk, the same bits everywhere.

Contraction and fast-math stay off; each piece is inlined where it is used and vectorizes with the loop around it. The one
fused operation, `exact_product_add`, is used only where the product is exact, so that fusing changes no bit.
"""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic

from ..nvfp4 import E4M3_MAX, E4M3_MAX_CODE, MIN_NORMAL_CODE, ZERO_BLOCK_CODE

BF16, F16, F32 = 0, 1, 2
KINDS = {"H": BF16, "e": F16, "f": F32}  # by numpy's type characters; uint16 stands for bfloat16
F16_TO_F32 = np.float32(2.0**112)
ZERO_CODE = np.int32(ZERO_BLOCK_CODE)
_GRID = np.float32(2.0**22)
LOWEST, HIGHEST = np.int32(MIN_NORMAL_CODE), np.int32(E4M3_MAX_CODE)
_LOWEST_BITS = np.uint32((MIN_NORMAL_CODE << 20) + (120 << 23))
_HIGHEST_BITS = np.uint32((E4M3_MAX_CODE << 20) + (120 << 23))


def _choose_cache() -> None:
    """Point numba's cache at a folder of our own where it would find none that is writable."""
    if os.access(Path(__file__).parent, os.W_OK) or "NUMBA_CACHE_DIR" in os.environ:
        return
    home = Path.home()
    if os.access(home, os.W_OK):
        return
    folder = Path(tempfile.gettempdir()) / f"mfptq-numba-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid == os.getuid():
        numba.config.CACHE_DIR = str(folder)


_choose_cache()
jit = numba.njit(nogil=True, error_model="numpy", cache=True)
inline = numba.njit(nogil=True, error_model="numpy", inline="always")


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(_context: Any, _value: Any) -> Any:
    """Return the bits of a float32 as uint32."""

    def generate(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def float_of(_context: Any, _value: Any) -> Any:
    """Return the float32 of uint32 bits."""

    def generate(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


_HAS_FMA = platform.machine() not in ("x86_64", "AMD64") or binding.get_host_cpu_features().get("fma", False)


@intrinsic  # type: ignore[untyped-decorator]
def exact_product_add(_context: Any, _x: Any, _y: Any, _z: Any) -> Any:
    """Return x * y + z where x * y is exact in float32: in one instruction where there is one."""

    def generate(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        x, y, z = args
        return builder.fma(x, y, z) if _HAS_FMA else builder.fadd(builder.fmul(x, y), z)

    return types.float32(types.float32, types.float32, types.float32), generate


@inline
def _grid(y):  # type: ignore[no-untyped-def]
    """Return the bits of 2**22, 2**23 or 2**24: adding it to y < 8 rounds y to E2M1's step at y, ties to even."""
    return max(bits_of(y) & np.uint32(0x7F800000), np.uint32(0x3F800000)) + np.uint32(22 << 23)


@inline
def round_e2m1(y):  # type: ignore[no-untyped-def]
    """Return y in [0, 7) rounded to E2M1, ties to even.

    With t = max(y, 1), y + t * 2**22 has the last place of E2M1's step at y; any tie has an even t * 2**22.
    """
    t = y if y > np.float32(1) else np.float32(1)
    return exact_product_add(t, -_GRID, exact_product_add(t, _GRID, y))


@inline
def e2m1_code(y):  # type: ignore[no-untyped-def]
    """Return the code 0..7 of y in [0, 6]: the low bits of y on its grid, plus two for each octave above 2."""
    grid = _grid(y)
    return (bits_of(y + float_of(np.uint32(grid))) + (grid >> np.uint32(22)) + np.uint32(6)) & np.uint32(7)


@inline
def scale_value(code):  # type: ignore[no-untyped-def]
    """Return the float32 value of a normal E4M3 code."""
    return float_of(np.uint32((np.uint32(code) << np.uint32(20)) + np.uint32(120 << 23)))


@inline
def scale_code(value):  # type: ignore[no-untyped-def]
    """Return the E4M3 code of a value in the normal range up to 448, to nearest, ties to even; below it, some code < 8."""
    bits = bits_of(value)
    rounded = bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))
    return np.int32(rounded >> np.uint32(20)) - np.int32(960)


@inline
def bounded(code):  # type: ignore[no-untyped-def]
    """Return the nearest scale code that `search` uses: no subnormal, no NaN."""
    return max(min(np.int32(code), HIGHEST), LOWEST)


@inline
def neighbour(value, codes):  # type: ignore[no-untyped-def]
    """Return the scale `codes` (shifted left by 20) further than `value`, both normal E4M3 values, within 8..126."""
    bits = np.uint32(bits_of(value) + codes)
    bits = bits if bits > _LOWEST_BITS else _LOWEST_BITS
    return float_of(np.uint32(bits if bits < _HIGHEST_BITS else _HIGHEST_BITS))


@inline
def base_code(largest, global_scale):  # type: ignore[no-untyped-def]
    """Return the code of a block's scale rounded to nearest, kept out of the subnormals."""
    return bounded(scale_code(min(largest / np.float32(6) * global_scale, np.float32(E4M3_MAX))))


@inline
def nonzero_nibbles(word):  # type: ignore[no-untyped-def]
    """Return bit 3 of each nibble set where its magnitude, bits 0 to 2, is not zero."""
    any_bit = word | (word << np.uint32(1)) | (word << np.uint32(2))
    return (any_bit & np.uint32(0x44444444)) << np.uint32(1)


@inline
def count_bits(word):  # type: ignore[no-untyped-def]
    """Return the number of set bits, of which only every fourth may be set."""
    x = word >> np.uint32(3)
    return np.int64((np.uint32(x * np.uint32(0x11111111))) >> np.uint32(28))
