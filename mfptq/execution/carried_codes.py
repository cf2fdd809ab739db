"""Take FP8 weights over whose codes stay as they are: read a tile's codes, see that they are numbers, count what is in them.

Called by `execution.engine`. No code is changed here, and none is decoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ..checkpoint.encoding import Region
from ..encodings.scaled import ScaledCodes
from ..errors import NonFiniteWeightError, quote
from ..kernels import ErrorStats, Float64Array
from ..nvfp4 import E4M3_VALUES, ByteArray, Float32Array

if TYPE_CHECKING:
    from ..checkpoint.source import Source
    from .strips import Parts, Strip
    from .tiles import Tile

AT_ONCE: Final = 2**17  # codes: temporaries stay in the processor's cache
_SQUARES: Final = np.square(E4M3_VALUES, dtype=np.float32)  # NaN for the codes of NaN


def carried_scales(source: Source, strip: Strip) -> Float32Array:
    """Return the scales of a strip's segments, `[rows, columns]` of them."""
    region = Region(strip.first, strip.rows, 0, strip.weight.columns)
    return _encoding(strip.weight.encoding).segment_scales(source, region, strip.segment)


def read_codes(source: Source, tile: Tile, codes: ByteArray) -> None:
    """Fill `codes`, flat, with those of a tile."""
    _encoding(tile.weight.encoding).read_codes(source, tile.region, codes)


def carried(tile: Tile, codes: ByteArray, parts: Parts, scales: Float32Array) -> ErrorStats:
    """Return the statistics of a tile that goes over; `scales` are those of its segments.

    Raises NonFiniteWeightError for a code or a scale that is NaN, or an infinite scale.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        energy = _energy(codes, parts) * np.square(scales, dtype=np.float64)
    if not np.isfinite(energy).all():
        first = int(np.flatnonzero(~np.isfinite(energy))[0])
        raise _not_finite(tile, codes, parts, first)
    zero = int((energy == 0).sum())
    return ErrorStats(tile.size, squared_weight=float(energy.sum()), zero_blocks=zero, checksum=tile.checksum(codes))


def _energy(codes: ByteArray, parts: Parts) -> Float64Array:
    """Return the sum of squares of each segment's codes."""
    starts, found = parts.starts, np.empty(len(parts.starts) - 1)
    step = max(1, AT_ONCE * len(found) // len(codes))
    for begin in range(0, len(found), step):
        span = starts[begin : begin + step + 1]
        squares = _SQUARES[codes[span[0] : span[-1]]]
        found[begin : begin + step] = np.add.reduceat(squares, span[:-1] - span[0], dtype=np.float64)
    return found


def _not_finite(tile: Tile, codes: ByteArray, parts: Parts, segment: int) -> NonFiniteWeightError:
    """Return the error for the first value of a segment that is no number."""
    begin, end = parts.starts[segment : segment + 2]
    bad = np.flatnonzero(np.isnan(_SQUARES[codes[begin:end]]))
    place = tile.start + int(begin) + (int(bad[0]) if len(bad) else 0)
    return NonFiniteWeightError(
        f"{quote(tile.weight.module)} in {quote(tile.weight.shard)} holds no number at flat index {place}, a code or its "
        "scale: it cannot go over: ignore it or repair the source"
    )


def _encoding(encoding: object) -> ScaledCodes:
    assert isinstance(encoding, ScaledCodes)
    return encoding
