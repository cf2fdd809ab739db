"""Cast MXFP4 to NVFP4 without rounding: codes go over as they are, exponents become block scales.

Called by `families`. One exponent 2^k holds for 32 columns, two blocks of NVFP4. With k_max the largest exponent of a fused group,
its global scale is 2^(8 - k_max) and a block's scale 2^(k - k_max + 8), which E4M3 holds for k down to k_max - 17. Blocks below are
rounded with the smallest scale: what they lose is under 2^-19 of the largest.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from ..encodings.codes import NAN_EXPONENT
from ..encodings.fp4 import Mxfp4
from ..errors import NonFiniteWeightError, quote
from ..kernels import ErrorStats
from ..nvfp4 import BLOCK_SIZE, E2M1_VALUES, ByteArray, e2m1_encode, pack, unpack

if TYPE_CHECKING:
    from ..checkpoint.source import Source
    from .tiles import Tile

BIAS: Final = 127
LARGEST, SMALLEST = 8, -9  # powers of two that an E4M3 block scale holds
_SQUARES: Final = np.array(
    [E2M1_VALUES[low & 7] ** 2 + E2M1_VALUES[high & 7] ** 2 for high in range(16) for low in range(16)], np.float32
)  # of the two values that a byte holds


def cast_global_scale(largest: float) -> float:
    """Return the global scale of a fused group whose largest block scale is 2^k_max; 0 for a group of zero blocks only."""
    return 2.0**LARGEST / (largest or 1.0)


def largest_scale(source: Source, tile: Tile) -> float:
    """Return the largest block scale of a tile, 2^k; 0 if all have the byte of zero blocks. Raises NonFiniteWeightError for NaN."""
    exponents = _encoding(tile).exponents(source, tile.region)
    largest = int(exponents.max())
    if largest == NAN_EXPONENT:
        place = tile.start + int(np.flatnonzero(exponents.reshape(-1) == NAN_EXPONENT)[0]) * BLOCK_SIZE
        weight = quote(tile.weight.module)
        raise NonFiniteWeightError(
            f"{weight} in {quote(tile.weight.shard)} holds nan at flat index {place}: it cannot be quantized: "
            "ignore it or repair the source"
        )
    return math.ldexp(1.0, largest - BIAS) if largest else 0.0


def read_codes(source: Source, tile: Tile, codes: ByteArray) -> ByteArray:
    """Fill `codes` with those of a tile, two to a byte, and return the exponent of each 16 values, flat."""
    encoding = _encoding(tile)
    encoding.read_codes(source, tile.region, codes)
    return encoding.exponents(source, tile.region).reshape(-1)


def cast_blocks(codes: ByteArray, exponents: ByteArray, global_scale: float, scales: ByteArray) -> ErrorStats:
    """Write the E4M3 codes of the scales of n blocks of 16 with exponents `[n]` to `scales` `[n]`; return what was lost.

    `codes` `[n, 8]` are changed where a block lies below what a scale can hold, and nowhere else.
    """
    powers = exponents.astype(np.int32) - BIAS + round(math.log2(global_scale))
    scales[:] = np.where(powers >= -6, (powers + 7) << 3, 1 << np.clip(powers - SMALLEST, 0, 2))
    energy = _SQUARES[codes].sum(axis=1, dtype=np.float64)
    stats = ErrorStats(codes.size * 2, zero_blocks=int((energy == 0).sum()))
    energy *= np.exp2(2.0 * (exponents.astype(np.float64) - BIAS))
    stats.squared_weight = float(energy.sum())
    below = np.flatnonzero(powers < SMALLEST)
    if below.size:
        _round(codes, below, (powers, energy, global_scale), stats)
    return stats


def _round(
    codes: ByteArray,
    rows: np.ndarray[tuple[int], np.dtype[np.int64]],
    known: tuple[np.ndarray[tuple[int], np.dtype[np.int32]], np.ndarray[tuple[int], np.dtype[np.float64]], float],
    stats: ErrorStats,
) -> None:
    """Round the blocks of some rows with the smallest scale; `known`: the power of each block, its energy, the global scale."""
    powers, energy, global_scale = known
    nibbles = unpack(codes[rows])
    values = E2M1_VALUES[nibbles & 7] * np.exp2((powers[rows] - SMALLEST).astype(np.float32))[:, None]
    rounded = e2m1_encode(values)
    codes[rows] = pack(rounded | np.where(rounded > 0, nibbles & 8, 0).astype(np.uint8))
    unit = 2.0**SMALLEST / global_scale
    errors = ((E2M1_VALUES[rounded] - values).astype(np.float64) ** 2).sum(axis=1) * unit * unit
    stats.squared_error = stats.rounding_squared_error = float(errors.sum())
    stats.zeroed = int(((rounded == 0) & (nibbles & 7 > 0)).sum())
    known_energy = energy[rows]
    relative = np.sqrt(np.divide(errors, known_energy, out=np.zeros_like(errors), where=known_energy > 0))
    stats.worst_block = float(relative.max())


def _encoding(tile: Tile) -> Mxfp4:
    assert isinstance(tile.weight.encoding, Mxfp4)
    return tile.weight.encoding
