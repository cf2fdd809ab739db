"""Tensors multiplied by powers of two, a row's and a column's, while they are read: what smoothing does to a checkpoint.

Made by `smoothing`. To whoever reads it a smoothed tensor is one more encoding, so kernels, methods and devices know nothing
of it. A product that the tensor's dtype cannot hold exactly is an error, never rounded; only a norm whose weight is added to
something before it multiplies is rounded, since the sum is what is multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.encoding import CodeScaler, Encoding, Region
from ..checkpoint.source import Source
from ..checkpoint.weights import StoredTensor
from ..dtypes import BF16, DTYPE_BITS, F32
from ..errors import SmoothingError, SourceError, quote
from .codes import bf16_bits

Exponents = npt.NDArray[np.int8]
EXACT_DTYPES = (BF16, F32)  # F16 has too few exponents for its products to be exact
_AT_ONCE = 2**16  # values multiplied at once: temporaries stay in the processor's cache
_BF16_MANTISSA = 7


@dataclass(frozen=True, slots=True, eq=False)
class Powers:
    """Exponents of the factors of a tensor, seen as a matrix [R, K] whose rows are all dimensions but the last.

    `rows` `[R]` and `columns` `[S, K]` are added; a tensor of S slices, R / S rows each, has its columns' factors for every
    slice. A value x becomes `(x + offset) * 2^exponent - offset`.
    """

    rows: Exponents | None = None
    columns: Exponents | None = None
    offset: float = 0.0

    def of(self, region: Region, all_rows: int) -> npt.NDArray[np.int16]:
        """Return the exponents of a region, `[rows or 1, columns]`."""
        found = np.zeros((1, 1), np.int16)
        span = np.arange(region.row, region.row + region.rows)
        if self.columns is not None:
            part = self.columns[:, region.column : region.column + region.columns]
            found = found + (part if len(part) == 1 else part[span // (all_rows // len(part))])
        if self.rows is not None:
            found = found + self.rows[span, None]
        return np.asarray(found, np.int16)


@dataclass(frozen=True, slots=True)
class Smoothed(Encoding):
    """A tensor, plain or itself encoded, with the powers of two that it is multiplied by; from a row on."""

    tensor: StoredTensor
    powers: Powers
    first_row: int = 0

    @property
    def format(self) -> str:
        """What the tensor is stored as."""
        return self.tensor.encoding.format if self.tensor.encoding is not None else self.tensor.info.dtype

    @property
    def shards(self) -> frozenset[str]:
        """The files that its values, or codes and scales, lie in."""
        return self.tensor.encoding.shards if self.tensor.encoding is not None else frozenset({self.tensor.shard})

    def from_row(self, row: int) -> Smoothed:
        """Return the encoding of the rows from one on."""
        return replace(self, first_row=self.first_row + row)

    def ranges(self, region: Region) -> list[tuple[int, int]]:
        """Return where a region of whole rows, or of a part of one, lies; of an encoded tensor, where its codes lie."""
        region = self._absolute(region)
        if self.tensor.encoding is not None:
            return self.tensor.encoding.ranges(region)
        width = DTYPE_BITS[self.tensor.info.dtype] // 8
        start = region.row * self.tensor.info.shape[-1] + region.column
        return [(self.tensor.offset + start * width, region.size * width)]

    def decode(self, source: Source, region: Region, out: npt.NDArray[Any], scaler: CodeScaler) -> None:
        """Read a region, whole rows or a part of one, and multiply it; raises SmoothingError where that is not exact."""
        place = self._absolute(region)
        exponents = self.powers.of(place, self.tensor.matrix.rows)
        values = out.reshape(region.rows, region.columns)
        self._read(source, region, out, scaler)
        if self.powers.offset:
            _multiply_sum(values, exponents, self.powers.offset)
            return
        if values.dtype == np.uint16:
            if scaler.shift(values, (exponents << _BF16_MANTISSA).view(np.uint16)):
                return
            self._read(source, region, out, scaler)  # for a closer look
        step = max(1, _AT_ONCE // region.columns)
        for row in range(0, region.rows, step):
            part = exponents if len(exponents) == 1 else exponents[row : row + step]
            wrong = _multiply(values[row : row + step], part)
            if wrong is not None:
                raise self._inexact(place.row + row + wrong[0], place.column + wrong[1])

    def _read(self, source: Source, region: Region, out: npt.NDArray[Any], scaler: CodeScaler) -> None:
        if self.tensor.encoding is not None:
            self.tensor.encoding.decode(source, self._absolute(region), out, scaler)
            return
        ((offset, _),) = self.ranges(region)
        source.read_into(self.tensor.shard, offset, out.view(np.uint8).data)

    def _absolute(self, region: Region) -> Region:
        return region._replace(row=self.first_row + region.row)

    def _inexact(self, row: int, column: int) -> SmoothingError:
        exponent = int(self.powers.of(Region(row, 1, column, 1), self.tensor.matrix.rows)[0, 0])
        return SmoothingError(
            f"{quote(self.tensor.info.name)} in {quote(self.tensor.shard)}: the value in row {row}, column {column} times "
            f"2^{exponent} is none that {self.tensor.info.dtype} can hold exactly: convert without smoothing"
        )


def smoothed(tensor: StoredTensor, powers: Mapping[str, Powers]) -> StoredTensor:
    """Return a tensor as it is to be read, given the factors of tensors by name: itself, or multiplied.

    Raises SourceError for factors of a tensor of another shape.
    """
    found = powers.get(tensor.info.name)
    if found is None:
        return tensor
    matrix = tensor.matrix
    fits = found.rows is None or len(found.rows) == matrix.rows
    if found.columns is not None:
        slices, columns = found.columns.shape
        fits = fits and columns == matrix.columns and slices > 0 and matrix.rows % slices == 0
    if not fits:
        raise SourceError(f"{quote(tensor.info.name)} is {list(tensor.info.shape)}: its factors are of another shape")
    return tensor._replace(encoding=Smoothed(tensor, found))


Place = tuple[int, int]


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def _multiply(values: npt.NDArray[Any], exponents: npt.NDArray[np.int16]) -> Place | None:
    """Multiply bfloat16 or float32 values in place; return the place of one that would not be exact, or None.

    NaN and infinity stay: who reads them must look.
    """
    is_bf16 = values.dtype == np.uint16
    exact = (values.astype(np.uint32) << 16).view(np.float32) if is_bf16 else values
    factors = np.ldexp(np.float32(1), exponents)
    found = exact * factors
    bits = found.view(np.uint32)
    wrong = np.isfinite(exact) & (~np.isfinite(found) | (found / factors != exact))
    if is_bf16:
        wrong |= (bits & 0xFFFF) != 0
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        return int(row), int(column)
    values[...] = bits >> 16 if is_bf16 else found
    return None


def _multiply_sum(values: npt.NDArray[Any], exponents: npt.NDArray[np.int16], offset: float) -> None:
    """Replace values x in place by `(x + offset) * 2^exponent - offset`, rounded to their dtype."""
    is_bf16 = values.dtype == np.uint16
    exact = (values.astype(np.uint32) << 16).view(np.float32) if is_bf16 else values
    found = (np.ldexp(exact.astype(np.float64) + offset, exponents) - offset).astype(np.float32)
    values[...] = bf16_bits(found) if is_bf16 else found
