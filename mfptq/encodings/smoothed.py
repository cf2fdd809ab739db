"""Multiply tensors by powers of two, a row's and a column's, while they are read: what smoothing does to a checkpoint.

Called by `smoothing.plan`, and by `comparison.pairing` to verify. To whoever reads it a smoothed tensor is one more encoding, so kernels, methods and devices know nothing
of it. Products are exact as long as they are normal numbers of the tensor's dtype. Below those they are rounded, by no more than
2^-134; beyond them is an error where smoothing was asked for, and the largest number where it came by default. A norm whose weight is
added to something before it multiplies is rounded too, since the sum is what is multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
_LARGEST = {
    np.uint16: np.float32(2.0**128 - 2.0**120),
    np.float32: np.finfo(np.float32).max,
}  # of bfloat16 as bits, of float32


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
        found = np.zeros((1, region.columns), np.int16)
        span = np.arange(region.row, region.row + region.rows)
        if self.columns is not None:
            part = self.columns[:, region.column : region.column + region.columns]
            found = found + (part if len(part) == 1 else part[span // (all_rows // len(part))])
        if self.rows is not None:
            found = found + self.rows[span, None]
        return np.asarray(found, np.int16)


@dataclass(frozen=True, slots=True)
class Smoothed(Encoding):
    """A tensor, plain or itself encoded, with the powers of two that it is multiplied by.

    `strict`: a product beyond the dtype's range is an error, instead of the largest number.
    """

    tensor: StoredTensor
    powers: Powers
    strict: bool = False

    @property
    def format(self) -> str:
        """What the tensor is stored as."""
        return self.tensor.encoding.format if self.tensor.encoding is not None else self.tensor.info.dtype

    @property
    def parts(self) -> tuple[StoredTensor | None, ...]:
        """The tensor, or its codes and scales."""
        return self.tensor.encoding.parts if self.tensor.encoding is not None else (self.tensor,)

    @property
    def divisors(self) -> Exponents | None:
        """Exponents `[K]` of what the channels of its input are divided by, at its first row; None where they are not."""
        columns = self.powers.columns
        return None if columns is None else columns[self.first_row * len(columns) // self.tensor.matrix.rows]

    def ranges(self, region: Region) -> list[tuple[int, int]]:
        """Return where a region of whole rows, or of a part of one, lies; of an encoded tensor, where its codes lie."""
        region = self._absolute(region)
        if self.tensor.encoding is not None:
            return self.tensor.encoding.ranges(region)
        width = DTYPE_BITS[self.tensor.info.dtype] // 8
        start = region.row * self.tensor.info.shape[-1] + region.column
        return [(self.tensor.offset + start * width, region.size * width)]

    def decode(self, source: Source, region: Region, out: npt.NDArray[Any], scaler: CodeScaler) -> None:
        """Read a region, whole rows or a part of one, and multiply it; raises SmoothingError for products out of range if strict."""
        place = self._absolute(region)
        exponents = self.powers.of(place, self.tensor.matrix.rows)
        values = out.reshape(region.rows, region.columns)
        self._read(source, region, out, scaler)
        if values.dtype == np.uint16 and not self.powers.offset:
            if scaler.shift(values, (exponents << _BF16_MANTISSA).view(np.uint16)):
                return
            self._read(source, region, out, scaler)  # for a closer look
        step = max(1, _AT_ONCE // region.columns)
        for row in range(0, region.rows, step):
            part = exponents if len(exponents) == 1 else exponents[row : row + step]
            beyond = _multiply(values[row : row + step], part, self.powers.offset)
            if beyond is not None and self.strict:
                raise self._out_of_range(place.row + row + beyond[0], place.column + beyond[1])

    def _read(self, source: Source, region: Region, out: npt.NDArray[Any], scaler: CodeScaler) -> None:
        if self.tensor.encoding is not None:
            self.tensor.encoding.decode(source, self._absolute(region), out, scaler)
            return
        ((offset, _),) = self.ranges(region)
        source.read_into(self.tensor.shard, offset, out.view(np.uint8).data)

    def _absolute(self, region: Region) -> Region:
        return region._replace(row=self.first_row + region.row)

    def _out_of_range(self, row: int, column: int) -> SmoothingError:
        exponent = int(self.powers.of(Region(row, 1, column, 1), self.tensor.matrix.rows)[0, 0])
        return SmoothingError(
            f"{quote(self.tensor.info.name)} in {quote(self.tensor.shard)}: the value in row {row}, column {column} times "
            f"2^{exponent} is larger than any number of {self.tensor.info.dtype}: convert without smoothing"
        )


def smoothed(tensor: StoredTensor, powers: Mapping[str, Powers], *, strict: bool = False) -> StoredTensor:
    """Return a tensor as it is to be read, given the factors of tensors by name: itself, or multiplied; see `Smoothed`.

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
    return tensor._replace(encoding=Smoothed(tensor, found, strict=strict))


Place = tuple[int, int]


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def _multiply(values: npt.NDArray[Any], exponents: npt.NDArray[np.int16], offset: float) -> Place | None:
    """Replace bfloat16 or float32 values x in place by `(x + offset) * 2^exponent - offset`, rounded to their dtype.

    What is beyond the dtype becomes its largest number; the place of the first such value is returned, or None. NaN and infinity
    stay: who reads them must look.
    """
    is_bf16 = values.dtype == np.uint16
    exact = (values.astype(np.uint32) << 16).view(np.float32) if is_bf16 else values
    if offset:
        found = (np.ldexp(exact.astype(np.float64) + offset, exponents) - offset).astype(np.float32)
    else:
        found = exact * np.ldexp(np.float32(1), exponents)
    beyond = np.isfinite(exact) & np.isinf(found)
    place: Place | None = None
    if beyond.any():
        row, column = np.argwhere(beyond)[0]
        place = int(row), int(column)
        found = np.where(beyond, np.copysign(_LARGEST[values.dtype.type], exact), found)
    values[...] = bf16_bits(found) if is_bf16 else found
    return place
