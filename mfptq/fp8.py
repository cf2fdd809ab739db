"""The FP8 formats as compressed-tensors stores them: how scales follow from magnitudes, and a plain reference in numpy.

A value is E4M3: sign, four bits of exponent, three of mantissa, at most 448. All values of a segment share one scale, a
factor: `w = e4m3 * scale`. A segment is a row (`fp8-dynamic`), the 128 columns of a row that a 128x128 block covers
(`fp8-block`), or a whole tensor (`fp8-static`). Formats: OCP FP8 (E4M3); compressed-tensors 0.20.0 for the arithmetic of
`minmax` on a CPU.

Everything here is written to be read; `kernels.fp8_code` does the same work, to the same bits, fast.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .dtypes import dtype_name
from .nvfp4 import E4M3_MAX, E4M3_VALUES, ByteArray, Float32Array, as_float32, e4m3_encode, round_bf16

TILE_SIDE: Final = 128  # rows and columns of an `fp8-block` block
LANES: Final = 16  # sums run over every 16th value first, as vectors do
# What compressed-tensors stores where a scale would be 0: the epsilon of the weight's dtype.
SCALE_EPSILON: Final = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23}

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


class Segments(NamedTuple):
    """Values that lie one behind the other and share scales: segment i has the elements `starts[i]` to `starts[i + 1]`.

    `starts` int64 `[n + 1]`, multiples of 16; `scales` and `others` float32 `[n]`: the scale, and another that is taken where
    its squared error is less. `exact` asks for the two roundings of compressed-tensors' CPU path.
    """

    starts: Int64Array
    scales: Float32Array
    others: Float32Array
    exact: bool


class Candidates(NamedTuple):
    """Two scales for each of m blocks, float32 `[m]`, and what each has cost so far, float64 `[m, 2, LANES]`.

    Squared errors are summed lane by lane, in the order of the values: so they do not depend on how a block is cut.
    """

    scales: Float32Array
    others: Float32Array
    sums: Float64Array

    @classmethod
    def of(cls, scales: Float32Array, others: Float32Array) -> Candidates:
        """Return candidates that have cost nothing yet; of any shape."""
        return cls(scales.reshape(-1), others.reshape(-1), np.zeros((scales.size, 2, LANES)))

    @property
    def best(self) -> Float32Array:
        """The other scale where it costs less, else the first: float32 `[m]`."""
        one, two = np.cumsum(self.sums, axis=2)[:, :, -1].T
        return np.where(two < one, self.others, self.scales)


def add_errors(values: npt.NDArray[np.generic], starts: Int64Array, places: Int64Array, candidates: Candidates) -> None:
    """Add the squared errors of flat values to the sums of candidates: segment i, as in Segments, is of block `places[i]`."""
    x = np.abs(as_float32(values))
    for begin, end, place in zip(starts[:-1], starts[1:], places, strict=True):
        for row, scale in enumerate((candidates.scales[place], candidates.others[place])):
            squares = _squares(x[begin:end], scale, "F32", exact=False)
            candidates.sums[place, row] = np.cumsum(
                np.concatenate([candidates.sums[place, row][None], squares]), axis=0
            )[-1]


def round_to(values: Float32Array, dtype: str) -> Float32Array:
    """Return float32 values rounded to BF16, F16 or F32 (nearest, ties to even), still as float32."""
    if dtype == "BF16":
        return round_bf16(values)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return values


def minmax_scales(amax: Float32Array, dtype: str) -> Float32Array:
    """Return compressed-tensors' scales for largest magnitudes in weights stored as `dtype`: amax / 448, rounded to it."""
    found = round_to(amax / np.float32(E4M3_MAX), dtype)
    return np.where(found == 0, np.float32(SCALE_EPSILON[dtype]), found).astype(np.float32)


def search_scales(amax: Float32Array) -> Float32Array:
    """Return float32 scales that bring each largest magnitude to 448."""
    return minmax_scales(amax, "F32")


def power_scales(amax: Float32Array) -> Float32Array:
    """Return the least powers of two that keep each magnitude within 448.

    Engines round the scales of blocks up to powers of two where their kernels need that: so they serve what was measured.
    """
    mantissa, exponent = np.frexp(amax.astype(np.float64) / E4M3_MAX)
    found = np.ldexp(1.0, np.maximum(np.where(mantissa == 0.5, exponent - 1, exponent), -126))
    return np.where(amax == 0, SCALE_EPSILON["F32"], found).astype(np.float32)


def stored_scales(scales: Float32Array, dtype: str) -> bytes:
    """Return scales as they are stored, little-endian; they must be numbers of that dtype already."""
    if dtype == "BF16":
        return (np.ascontiguousarray(scales).view(np.uint32) >> 16).astype("<u2").tobytes()
    return scales.astype("<f2" if dtype == "F16" else "<f4").tobytes()


def encode(magnitudes: Float32Array, scales: Float32Array, dtype: str, *, exact: bool) -> ByteArray:
    """Return E4M3 codes 0..126 of magnitudes at their scales; `exact` rounds each quotient to `dtype` first."""
    with np.errstate(over="ignore"):
        quotient = magnitudes / scales
    quotient = round_to(quotient, dtype) if exact else quotient
    return e4m3_encode(np.minimum(quotient, np.float32(E4M3_MAX)))


def dequantize(codes: ByteArray, scales: Float32Array) -> Float32Array:
    """Return float32 values of E4M3 codes with their sign, times scales that broadcast against them."""
    return np.asarray(E4M3_VALUES[codes] * scales, np.float32)


def quantize(values: npt.NDArray[np.generic], segments: Segments) -> tuple[ByteArray, Float32Array]:
    """Return (codes, scales `[n]`) of flat values, bfloat16 as raw uint16 bits: each segment at the better of its two scales."""
    dtype = dtype_name(values)
    signed = as_float32(values)
    codes, chosen = np.empty(signed.shape, np.uint8), segments.scales.copy()
    for number, (begin, end) in enumerate(zip(segments.starts[:-1], segments.starts[1:], strict=True)):
        x = np.abs(signed[begin:end])
        scale: Any = segments.scales[number]
        other: Any = segments.others[number]
        if other != scale and _error(x, other, dtype, segments.exact) < _error(x, scale, dtype, segments.exact):
            chosen[number] = other
        negative = np.signbit(signed[begin:end])
        codes[begin:end] = encode(x, chosen[number], dtype, exact=segments.exact) | (negative << 7)
    return codes, chosen


def _error(x: Float32Array, scale: Any, dtype: str, exact: bool) -> float:  # noqa: FBT001 - a field, passed on
    lanes = np.cumsum(_squares(x, scale, dtype, exact=exact), axis=0)[-1]
    return float(np.cumsum(lanes)[-1])


def _squares(x: Float32Array, scale: Any, dtype: str, *, exact: bool) -> Float64Array:
    """Return the squared errors of magnitudes at a scale, LANES to a row."""
    difference = (dequantize(encode(x, scale, dtype, exact=exact), scale) - x).astype(np.float64)
    found: Float64Array = np.square(difference).reshape(-1, LANES)
    return found
