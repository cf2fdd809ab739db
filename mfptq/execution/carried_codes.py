"""Take weights over whose codes stay as they are: see that FP8's codes, and NVFP4's block scales, are numbers.

Called by `execution.conversions`. No code is changed here, and none is decoded; block scales are, where fused partners must
share them.
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
    from collections.abc import Iterable

    from ..checkpoint.source import Source
    from ..planning.jobs import CopyRun, CopyTensor
    from .strips import Parts, Strip
    from .tiles import Tile

AT_ONCE: Final = 2**17  # codes: temporaries stay in the processor's cache
_NAN_CODES: Final = (b"\x7f", b"\xff")
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


def mapped_scales(run: CopyRun, data: bytes, copies: Iterable[CopyTensor]) -> bytes:
    """Return block scales (E4M3) as they are to be written; `copies` are all that is copied into the file.

    Raises NonFiniteWeightError for the first that is NaN.
    """
    assert run.table is not None
    nan = min((place for code in _NAN_CODES if (place := data.find(code)) >= 0), default=-1)
    if nan >= 0:
        place = run.offset + nan
        of = next(copy for copy in copies if copy.offset <= place < copy.offset + copy.size)
        raise NonFiniteWeightError(
            f"the scale of block {place - of.offset} of {quote(of.name)} in {quote(of.shard or 'the source')} is NaN: it cannot go over: "
            "get the source anew, or convert what it was made from"
        )
    return data.translate(run.table)


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
