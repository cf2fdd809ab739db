"""Weights stored as one code for each value and one scale for each block of values: FP8, MXFP8, MXFP4, INT4, INT8, NVFP4.

One layout serves them all: codes `[N, K]`, row by row, and scales `[ceil(N / block_rows), ceil(K / block_columns)]`. A block at
the edge holds what is there. A stack `[E, N, K]` has scales `[E, ...]`: each matrix has blocks of its own.

Made by `fp4`, `fp8` and `integers`, which recognize them. Workers decode them tile by tile, from several threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..checkpoint.encoding import Bf16Array, CodeScaler, Encoding, Region, ScaleArray
from ..checkpoint.source import Source
from ..checkpoint.stored_bytes import read_bytes, read_scalar
from ..checkpoint.weights import StoredTensor
from ..dtypes import DTYPE_BITS
from .codes import CODE_FORMATS, E4M3, scale_codes, scale_values


@dataclass(frozen=True, slots=True)
class ScaledCodes(Encoding):
    """Codes and scales of a matrix of `rows` x `columns`, or of a stack of such; every scale multiplies.

    `factor` is a further scale, one float32 number for the whole matrix, by which `divides` says the others are divided.
    """

    label: str
    codes: str
    weight: StoredTensor
    scales: StoredTensor
    rows: int
    columns: int
    block_rows: int
    block_columns: int
    factor: StoredTensor | None = None
    divides: bool = False

    @property
    def format(self) -> str:
        """The format in words."""
        return self.label

    @property
    def is_fp8(self) -> bool:
        """Whether its codes are FP8 (E4M3)."""
        return self.codes == E4M3

    @property
    def parts(self) -> tuple[StoredTensor | None, ...]:
        """Its codes, scales and factor."""
        return self.weight, self.scales, self.factor

    def ranges(self, region: Region) -> list[tuple[int, int]]:
        """Return where the codes of a region lie: one range for whole rows, else one for each row."""
        bits = CODE_FORMATS[self.codes].bits
        first = (self.first_row + region.row) * self.columns + region.column
        if region.columns == self.columns:
            return [(self.weight.offset + first * bits // 8, region.size * bits // 8)]
        starts = range(first, first + region.rows * self.columns, self.columns)
        return [(self.weight.offset + start * bits // 8, region.columns * bits // 8) for start in starts]

    def decode(self, source: Source, region: Region, out: Bf16Array, scaler: CodeScaler) -> None:
        """Read a region and write its values; its codes are read into the end of `out`, and decoded in place."""
        lead = region.column % self.block_columns
        if lead:  # a part of a very long row, which begins inside a block
            wide = Region(region.row, region.rows, region.column - lead, region.columns + lead)
            whole = np.empty(wide.size, np.uint16)
            self.decode(source, wide, whole, scaler)
            out[:] = whole.reshape(wide.rows, wide.columns)[:, lead:].reshape(-1)
            return
        scales = self._scales(source, region)
        size = region.size * CODE_FORMATS[self.codes].bits // 8
        packed = out.view(np.uint8)[out.nbytes - size :]
        self.read_codes(source, region, packed)
        values, zeros = out.reshape(region.rows, region.columns), self.zero_points(source, region)
        if zeros is None:
            scaler(self.codes, packed, scales, values, run=self.block_columns)
        else:
            scale_codes(self.codes, packed, scales, values, run=self.block_columns, zeros=zeros)

    def read_codes(self, source: Source, region: Region, packed: npt.NDArray[np.uint8]) -> None:
        """Fill `packed` with the codes of a region, row after row, as they lie in the file."""
        end = 0
        for offset, length in self.ranges(region):
            source.read_into(self.weight.shard, offset, packed[end : end + length].data)
            end += length

    def zero_points(self, source: Source, region: Region) -> ScaleArray | None:  # noqa: ARG002 - for those that have any
        """Return what is taken from a region's codes before they are scaled, shaped as its scales; None for nothing."""
        return None

    def segment_scales(self, source: Source, region: Region, segment: tuple[int, int]) -> ScaleArray:
        """Return the float32 scale of each segment of `segment` rows and columns in some whole rows.

        No segment may have values of two blocks.
        """
        height, width = segment
        blocks = np.arange(0, region.columns, width) // self.block_columns
        return np.ascontiguousarray(self._scales(source, region)[::height, blocks])

    def _scales(self, source: Source, region: Region) -> ScaleArray:
        """Return the float32 scales of a region: one row for each of its rows, one column for each block it touches."""
        per_row = math.ceil(self.columns / self.block_columns)
        rows = self._scale_rows(np.arange(region.row, region.row + region.rows))
        first, last = int(rows[0]), int(rows[-1]) + 1
        width = per_row * DTYPE_BITS[self.scales.info.dtype] // 8
        data = read_bytes(source, self.scales, first * width, (last - first) * width)
        found = scale_values(data, self.scales.info.dtype).reshape(-1, per_row)[:, self._block_span(region)]
        if self.factor is not None:
            found = self._with_factor(source, found)
        return np.ascontiguousarray(found[rows - first], np.float32)

    def _block_span(self, region: Region) -> slice:
        """Return which blocks of a row a region touches."""
        return slice(
            region.column // self.block_columns, math.ceil((region.column + region.columns) / self.block_columns)
        )

    def _scale_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        matrix, row = np.divmod(self.first_row + rows, self.rows)
        found: npt.NDArray[np.int64] = matrix * math.ceil(self.rows / self.block_rows) + row // self.block_rows
        return found

    @np.errstate(divide="ignore", over="ignore", invalid="ignore")
    def _with_factor(self, source: Source, scales: ScaleArray) -> ScaleArray:
        assert self.factor is not None
        factor = np.float32(read_scalar(source, self.factor))
        found: ScaleArray = scales / factor if self.divides else scales * factor
        return found
