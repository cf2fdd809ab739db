"""The NVFP4 format as compressed-tensors `nvfp4-pack-quantized` stores it: constants, and a plain reference in numpy.

A value is E2M1 (sign, then one of 0 .5 1 1.5 2 3 4 6). Each 16 values along a row share an E4M3 scale; each fused group of
weights shares one float32 global scale, a divisor: `w = e2m1 * float(scale) / global_scale`. The value in an even column is
the low nibble of its byte. Formats: OCP Microscaling and FP8 (E4M3), NVIDIA NVFP4; compressed-tensors 0.20.0 for the layout.

Everything here is written to be read; `kernels` does the same work, to the same bits, fast.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

BLOCK_SIZE: Final = 16
E2M1_MAX: Final = 6.0
E4M3_MAX: Final = 448.0
E4M3_MAX_CODE: Final = 126
MIN_NORMAL_CODE: Final = 8  # 2**-6: several engines decode the subnormal codes below it wrongly
ZERO_BLOCK_CODE: Final = 0x20  # 0.125, what compressed-tensors stores where a scale would be 0
NEGLIGIBLE_AMAX: Final = 1e-30
INPUT_SCALE_NUMERATOR: Final = E4M3_MAX * E2M1_MAX
SEARCH_NUMERATOR: Final = 1792.0  # 448 * 4: a power-of-two scale below leaves room above the largest block
SEARCH_OFFSETS: Final = (0, -1, 1, 5, 4, 6, 3, -2, 2, 7)

E2M1_VALUES: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _e4m3_value(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return math.nan if code & 127 == 127 else -magnitude if code & 128 else magnitude


E4M3_VALUES: Final = np.array([_e4m3_value(code) for code in range(256)], np.float32)
_BF16_TINY: Final = float(np.float32(2.0**-126))


def round_bf16(values: Float32Array) -> Float32Array:
    """Return float32 values rounded to bfloat16 (nearest, ties to even), still as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return np.where(np.isfinite(values), rounded.astype(np.uint32).view(np.float32).reshape(np.shape(values)), values)


def search_global_scale(amax: float) -> float:
    """Return the global scale of `search` for a fused group's largest magnitude: a power of two, 1 for all zero."""
    if amax < NEGLIGIBLE_AMAX:
        return 1.0
    mantissa, exponent = math.frexp(SEARCH_NUMERATOR / float(np.float32(amax)))
    del mantissa  # in [0.5, 1): floor(log2) is one less than frexp's exponent
    return math.ldexp(1.0, exponent - 1)


def minmax_global_scale(amax: float, dtype: str) -> float:
    """Return compressed-tensors' global scale for a fused group stored as `dtype` ("BF16", "F16" or "F32").

    A reciprocal and a product, each rounded in the weight's dtype. float16 is computed in float32: in float16 the
    library's product overflows for small weights.
    """
    bounded = np.float32(max(amax, _BF16_TINY))
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            inverse = round_bf16(np.float32(1) / bounded[None])
            value = round_bf16(inverse * np.float32(INPUT_SCALE_NUMERATOR))[0]
        else:
            value = np.float32(1) / bounded * np.float32(INPUT_SCALE_NUMERATOR)
    return float(value) if np.isfinite(value) else 1.0


def e4m3_encode(values: Float32Array) -> ByteArray:
    """Return E4M3 codes of non-negative values up to 448, rounded to nearest, ties to even, subnormals kept."""
    nearest = np.searchsorted(E4M3_VALUES[:127], values)
    upper = np.minimum(nearest, E4M3_MAX_CODE)
    lower = np.maximum(upper - 1, 0)
    below = values.astype(np.float64) - E4M3_VALUES[lower]
    above = E4M3_VALUES[upper].astype(np.float64) - values
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    return np.where(take_upper, upper, lower).astype(np.uint8)


def e2m1_encode(magnitudes: Float32Array) -> ByteArray:
    """Return E2M1 codes 0..7 of magnitudes, clamped to 6, rounded to nearest, ties to the even code."""
    middle = (E2M1_VALUES[:-1] + E2M1_VALUES[1:]) / 2
    tie_up = np.arange(7) % 2 == 1  # between code c and c + 1 the even one wins
    bounds = np.where(tie_up, middle, np.nextafter(middle, np.float32(np.inf)))
    return np.searchsorted(bounds, magnitudes, side="right").astype(np.uint8)


def pack(nibbles: ByteArray) -> ByteArray:
    """Return `[N, K]` nibbles as `[N, K/2]` bytes, even columns low."""
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.uint8)


def unpack(packed: ByteArray) -> ByteArray:
    """Return `[N, K/2]` bytes as `[N, K]` nibbles."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)


def dequantize(packed: ByteArray, scales: ByteArray, global_scale: float) -> Float32Array:
    """Return float32 `[N, K]` of packed values `[N, K/2]`, E4M3 scale codes `[N, K/16]` and the group's divisor."""
    nibbles = unpack(packed)
    values = np.where(nibbles & 8, -E2M1_VALUES[nibbles & 7], E2M1_VALUES[nibbles & 7])
    factors = E4M3_VALUES[scales] / np.float32(global_scale)
    return np.asarray(values * np.repeat(factors, BLOCK_SIZE, axis=1), np.float32)


def as_float32(weight: npt.NDArray[np.generic]) -> Float32Array:
    """Return a weight as float32, exactly; uint16 means raw bfloat16 bits."""
    if weight.dtype == np.uint16:
        return (weight.astype(np.uint32) << 16).view(np.float32)
    return weight.astype(np.float32)


@np.errstate(over="ignore")  # an error beyond float32 is infinite, and never the least
def quantize_search(weight: npt.NDArray[np.generic], global_scale: float) -> tuple[ByteArray, ByteArray]:
    """Return (packed, scale codes) of least squared error for each block, by the rule that defines `search`."""
    signed = as_float32(weight).reshape(-1, BLOCK_SIZE)
    x = np.abs(signed)
    largest = x.max(axis=1)
    scaled = np.minimum(largest / np.float32(6) * np.float32(global_scale), np.float32(E4M3_MAX))
    base = np.clip(e4m3_encode(scaled).astype(np.int64), MIN_NORMAL_CODE, E4M3_MAX_CODE)
    best = np.full(len(x), np.inf, np.float32)
    codes = base.copy()
    for offset in SEARCH_OFFSETS:
        code = np.clip(base + offset, MIN_NORMAL_CODE, E4M3_MAX_CODE)
        scale = E4M3_VALUES[code] / np.float32(global_scale)
        value = e2m1_encode(x * (np.float32(1) / scale)[:, None])
        error = np.zeros(len(x), np.float32)
        for i in range(BLOCK_SIZE):
            difference = E2M1_VALUES[value[:, i]] * scale - x[:, i]
            error += difference * difference
        better = error < best
        best = np.where(better, error, best)
        codes = np.where(better, code, codes)
    values = e2m1_encode(x * (np.float32(1) / (E4M3_VALUES[codes] / np.float32(global_scale)))[:, None])
    codes = np.where(values.any(axis=1), codes, ZERO_BLOCK_CODE)
    nibbles = values | np.where((signed < 0) & (values > 0), 8, 0).astype(np.uint8)
    rows = weight.shape[0]
    return pack(nibbles.reshape(rows, -1)), codes.astype(np.uint8).reshape(rows, -1)


def quantize_minmax(weight: npt.NDArray[np.generic], global_scale: float) -> tuple[ByteArray, ByteArray]:
    """Return (packed, scale codes) as compressed-tensors computes them on a CPU, bit for bit."""
    signed = as_float32(weight).reshape(-1, BLOCK_SIZE)
    largest = np.abs(signed).max(axis=1) / np.float32(6)
    if weight.dtype == np.uint16:
        largest = round_bf16(largest)
    g = np.float32(global_scale)
    codes = e4m3_encode(np.minimum(g * largest, np.float32(E4M3_MAX)))
    codes = np.where(codes == 0, ZERO_BLOCK_CODE, codes).astype(np.uint8)
    x = signed / (E4M3_VALUES[codes] / g)[:, None]
    nibbles = e2m1_encode(np.abs(x)) | np.where(x < 0, 8, 0).astype(np.uint8)
    rows = weight.shape[0]
    return pack(nibbles.reshape(rows, -1)), codes.reshape(rows, -1)
