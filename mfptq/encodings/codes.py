"""Hold the tables of code formats and scale dtypes, and the numpy reference that decodes them.

A decoded value is `round_bf16(float32(code) * float32(scale))`: one product, rounded once, as DeepSeek's script and
compressed-tensors' block dequantizer have it. Formats: OCP 8-bit floating point (E4M3: one NaN code for each sign, no
infinity) and OCP Microscaling (E2M1, E8M0).

Called by the formats here, by `comparison.stored_weights` and in tests: `kernels.decode` does the same work, to the same bits, fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..checkpoint.encoding import Bf16Array, DecodedArray, ScaleArray
from ..nvfp4 import E2M1_VALUES, E4M3_VALUES

E4M3, E2M1, INT4, INT8, UINT8 = "E4M3", "E2M1", "INT4", "INT8", "UINT8"
NAN_BITS: Final = 0x7FC0
NAN_EXPONENT: Final = 255  # of E8M0
BF16_NORMALS: Final = 0x7F00  # how many magnitudes of bfloat16 are normal numbers
_MAGNITUDE, _LEAST_NORMAL = np.uint16(0x7FFF), np.uint16(0x0080)
_CHUNK: Final = 2**16  # elements decoded at once: temporaries stay in the processor's cache


class CodeFormat(NamedTuple):
    """A code of `bits` bits, of which `values` are what each stands for; two 4-bit codes share a byte, the first one low."""

    bits: int
    values: npt.NDArray[np.float32]


CODE_FORMATS: Mapping[str, CodeFormat] = MappingProxyType({
    E4M3: CodeFormat(8, E4M3_VALUES),
    E2M1: CodeFormat(4, np.concatenate([E2M1_VALUES, -E2M1_VALUES])),
    INT4: CodeFormat(4, np.arange(-8, 8, dtype=np.float32)),  # offset binary
    INT8: CodeFormat(8, np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)),
    UINT8: CodeFormat(8, np.arange(-128, 128, dtype=np.float32)),  # offset binary
})  # fmt: skip

E8M0_VALUES: Final = np.concatenate(
    [np.ldexp(np.float32(1), np.arange(-127, 128)).astype(np.float32), np.full(1, np.nan, np.float32)]
)


def scale_values(data: npt.NDArray[np.uint8], dtype: str) -> ScaleArray:
    """Return the bytes of a scale tensor as float32, exactly; U8 means E8M0, since that is what writers mean by it."""
    if dtype in ("F8_E8M0", "U8"):
        return E8M0_VALUES[data]
    if dtype == "F8_E4M3":
        return E4M3_VALUES[data]
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view("<f2" if dtype == "F16" else "<f4").astype(np.float32)


def bf16_bits(values: ScaleArray) -> Bf16Array:
    """Return float32 values rounded to bfloat16, nearest, ties to even, as bits; every NaN becomes 0x7FC0."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(NAN_BITS), rounded)


class ReferenceScaler:
    """What `CodeScaler` asks for, by the definition."""

    @np.errstate(over="ignore", invalid="ignore")  # what is beyond bfloat16 is found by whoever reads the result
    def __call__(
        self,
        codes: str,
        packed: npt.NDArray[np.uint8],
        scales: ScaleArray,
        out: DecodedArray,
        *,
        run: int,
        zeros: ScaleArray | None = None,
    ) -> None:
        """Decode; see `CodeScaler`. `zeros`, shaped as `scales`, are taken from the codes' values first."""
        rows, columns = out.shape
        code_format = CODE_FORMATS[codes]
        bytes_per_row = columns * code_format.bits // 8
        step = max(1, _CHUNK // columns)
        for row in range(0, rows, step):
            part = packed[row * bytes_per_row : (row + step) * bytes_per_row]
            values = code_format.values[part if code_format.bits == 8 else _nibbles(part)].reshape(-1, columns)
            if zeros is not None:
                values = values - np.repeat(zeros[row : row + step], run, axis=1)[:, :columns]
            factors = np.repeat(scales[row : row + step], run, axis=1)[:, :columns]
            exact = values * factors
            out[row : row + step] = exact if out.dtype == np.float32 else bf16_bits(exact)

    def shift(self, values: Bf16Array, shifts: Bf16Array) -> bool:
        """Multiply by powers of two; see `CodeScaler`."""
        step = max(1, _CHUNK // values.shape[1])
        return all(
            _shift(values[row : row + step], shifts if len(shifts) == 1 else shifts[row : row + step])
            for row in range(0, len(values), step)
        )


scale_codes: Final = ReferenceScaler()


def _shift(values: Bf16Array, shifts: Bf16Array) -> bool:
    magnitude = values & _MAGNITUDE
    moved = magnitude + shifts - _LEAST_NORMAL  # what is too small wraps around, to more than the largest finite number
    largest = np.maximum(magnitude - _LEAST_NORMAL, moved)
    nonzero = magnitude != 0
    values += shifts * nonzero
    return bool((largest[nonzero] < BF16_NORMALS).all())


def _nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)
