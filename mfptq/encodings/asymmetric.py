"""Packed integers with zero points, as compressed-tensors stores asymmetric `pack-quantized` weights of 4 or 8 bits.

Called by `integers`, which recognizes them. A value is `round_bf16(float32(code - zero point) * float32(scale))`. Zero points
are packed like codes, but along rows: rows `8j` to `8j + 7` of a group share word `j` where there are 4 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..checkpoint.encoding import Region, ScaleArray
from ..checkpoint.source import Source
from ..checkpoint.weights import StoredTensor
from ..errors import SourceError, quote
from .codes import CODE_FORMATS
from .scaled import ScaledCodes

WORD = 32  # bits


@dataclass(frozen=True, slots=True, kw_only=True)
class AsymmetricIntegers(ScaledCodes):
    """Codes, scales and zero points of a matrix; a zero point is a code of the same kind."""

    zeros: StoredTensor

    @property
    def shards(self) -> frozenset[str]:
        """The files that its codes, scales and zero points lie in."""
        return frozenset({self.weight.shard, self.scales.shard, self.zeros.shard})

    def zero_points(self, source: Source, region: Region) -> ScaleArray:
        """Return the zero points of a region: one row for each of its rows, one column for each block it touches."""
        bits, groups = CODE_FORMATS[self.codes].bits, math.ceil(self.columns / self.block_columns)
        per_word = WORD // bits
        first, last = region.row // per_word, math.ceil((region.row + region.rows) / per_word)
        words = np.empty((last - first, groups), "<u4")
        source.read_into(
            self.zeros.shard, self.zeros.offset + first * groups * 4, words.reshape(-1).view(np.uint8).data
        )
        shifts = np.arange(per_word, dtype=np.uint32)[None, :, None] * np.uint32(bits)
        points = (words[:, None, :] >> shifts & np.uint32(2**bits - 1)).reshape(-1, groups)
        lead = region.row - first * per_word
        begin, end = region.column // self.block_columns, -(-(region.column + region.columns) // self.block_columns)
        found: ScaleArray = CODE_FORMATS[self.codes].values[points[lead : lead + region.rows, begin:end]]
        return found


def check_zeros(zeros: StoredTensor, rows: int, groups: int, bits: int) -> None:
    """Raise SourceError for zero points that are not packed as compressed-tensors packs them."""
    expected = (math.ceil(rows * bits / WORD), groups)
    if zeros.info.dtype != "I32" or zeros.info.shape != expected:
        raise SourceError(
            f"{quote(zeros.info.name)} is {zeros.info.dtype} {list(zeros.info.shape)}, expected zero points of {bits} bits "
            f"packed into I32 {list(expected)}"
        )
