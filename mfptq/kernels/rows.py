"""A chunk of one block of 16 columns in up to 64 rows, which share their columns' statistics, one row to a lane."""

from __future__ import annotations

import numpy as np

from ..nvfp4 import GROUP_SIZE
from .pieces import (
    BF16,
    F16_TO_F32,
    F32,
    HIGHEST,
    ZERO_CODE,
    bits_of,
    count_bits,
    float_of,
    inline,
    jit,
    nonzero_nibbles,
)

LANES = 64
ONE, SIX, ZERO = np.float32(1), np.float32(6), np.float32(0)


@inline
def _widened(bits):  # type: ignore[no-untyped-def]
    """Return the float32 value of a float16 whose bits are the upper half of `bits`."""
    magnitude = float_of(np.uint32((bits & np.uint32(0x7FFF0000)) >> np.uint32(3))) * F16_TO_F32
    return float_of(np.uint32(bits_of(magnitude) | (bits & np.uint32(0x80000000))))


@jit
def gather(source, kind, columns, column, row, count, lanes, values):  # type: ignore[no-untyped-def]
    """Transpose a block of `count` rows into float32 values[16 * 64]; lanes without a row are zero.

    `source` holds the tile's bits by 32: one float32, or two values of 16 bits, the first one low.
    """
    if kind == F32:
        for lane in range(count):
            start = (row + lane) * columns + column
            for i in range(GROUP_SIZE):
                values[i * LANES + lane] = float_of(source[start + i])
    else:
        for lane in range(count):
            start = ((row + lane) * columns + column) // 2
            for i in range(GROUP_SIZE // 2):
                pair = source[start + i]
                low, high = np.uint32(pair << np.uint32(16)), np.uint32(pair & np.uint32(0xFFFF0000))
                values[2 * i * LANES + lane] = float_of(low) if kind == BF16 else _widened(low)
                values[(2 * i + 1) * LANES + lane] = float_of(high) if kind == BF16 else _widened(high)
    for i in range(GROUP_SIZE):
        for lane in range(count, lanes):
            values[i * LANES + lane] = ZERO


@inline
def _code(bits):  # type: ignore[no-untyped-def]
    """Return the E2M1 code of a value's bits, without its sign: 0.5 has 252 above bit 22, 1 has 254, 6 has 259."""
    top = max((bits >> np.uint32(22)) & np.uint32(511), np.uint32(251))
    return np.uint32(top - np.uint32(251)) - np.uint32(np.uint32(top + np.uint32(2)) >> np.uint32(8))


@jit
def _pack_half(rounded, lanes, words):  # type: ignore[no-untyped-def]
    for lane in range(lanes):
        word, signs = np.uint32(0), np.uint32(0)
        for i in range(8):
            bits = bits_of(rounded[i * LANES + lane])
            word |= _code(bits) << np.uint32(4 * i)
            signs |= ((bits >> np.uint32(28)) & np.uint32(8)) << np.uint32(4 * i)
        words[lane] = word | (signs & nonzero_nibbles(word))


@jit
def pack(rounded, lanes, words, codes):  # type: ignore[no-untyped-def]
    """Write each row's 16 nibbles as words[lane] and words[LANES + lane]; an all-zero block gets 0x20."""
    _pack_half(rounded, lanes, words)
    _pack_half(rounded[8 * LANES :], lanes, words[LANES:])
    for lane in range(lanes):
        codes[lane] = codes[lane] if (words[lane] | words[LANES + lane]) else ZERO_CODE


@jit
def measure(values, count, norms, nonzero):  # type: ignore[no-untyped-def]
    """Write each row's sum of squares, and how many of its values are not zero."""
    for lane in range(count):
        total, found = ZERO, np.int32(0)
        for i in range(GROUP_SIZE):
            x = values[i * LANES + lane]
            total += x * x
            found += np.int32(x != ZERO)
        norms[lane] = total
        nonzero[lane] = found


@jit
def tally(words, codes, errors, rounding, norms, nonzero, count, stats):  # type: ignore[no-untyped-def]
    """Add a chunk to `stats`: the seven numbers of TileStats."""
    error, norm, plain, worst = stats[0], stats[1], stats[2], ZERO
    for lane in range(count):
        error += errors[lane]
        norm += norms[lane]
        plain += rounding[lane]
    stats[0], stats[1], stats[2] = error, norm, plain
    for lane in range(count):
        ratio = errors[lane] / (norms[lane] if norms[lane] > ZERO else ONE)
        worst = ratio if ratio > worst else worst
    stats[3] = max(stats[3], np.float64(worst))
    zeroed, saturated, empty = np.int32(0), np.int32(0), np.int32(0)
    for lane in range(count):
        stored = count_bits(nonzero_nibbles(words[lane])) + count_bits(nonzero_nibbles(words[LANES + lane]))
        zeroed += np.int32(nonzero[lane] - np.int32(stored))
        saturated += np.int32(1 if codes[lane] == HIGHEST else 0)
        empty += np.int32(1 if nonzero[lane] == 0 else 0)
    stats[4] += zeroed
    stats[5] += saturated
    stats[6] += empty
