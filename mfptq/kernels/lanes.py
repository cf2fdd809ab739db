"""A chunk of blocks in the layout that vectorizes: row i holds element i of 256 blocks, one block to a lane.

Loops run over all lanes, with constant bounds and constant distances between rows, so that the compiler needs no checks;
lanes beyond the last block hold zeros. Sums over a block run in index order, as every implementation's do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..nvfp4 import GROUP_SIZE
from .pieces import BF16, F16_TO_F32, F32, HIGHEST, bits_of, count_bits, float_of, jit, nonzero_nibbles

LANES = 256
PAIRS = GROUP_SIZE // 2
SQUARE = 8
_LOW, _HIGH, _MAGNITUDE = np.uint32(0x7FFF), np.uint32(0x7FFF0000), np.uint32(0x7FFFFFFF)
_HIGH_SIGN, _LOW_SIGN = np.uint32(0x80000000), np.uint32(0x8000)


@intrinsic  # type: ignore[untyped-decorator]
def _transpose(_context: Any, source: Any, at: Any, stride: Any, out: Any, to: Any) -> Any:
    """Transpose 8 rows of 8 uint32: from `source[at + k * stride + j]` to `out[to + j * LANES + k]`."""
    word, index = ir.IntType(32), ir.IntType(64)
    vector = ir.VectorType(word, SQUARE)

    def generate(target: Any, builder: Any, signature: Any, args: Any) -> Any:
        def place(array: int, position: Any) -> Any:
            data = target.make_array(signature.args[array])(target, builder, args[array]).data
            return builder.bitcast(builder.gep(data, [position]), vector.as_pointer())

        def row(start: Any, step: Any, number: int) -> Any:
            return builder.add(start, builder.mul(step, ir.Constant(index, number)))

        rows = [builder.load(place(0, row(args[1], args[2], k)), align=4) for k in range(SQUARE)]
        for half in (1, 2, 4):
            rows = _exchange(builder, rows, half)
        for j in range(SQUARE):
            builder.store(rows[j], place(3, row(args[4], ir.Constant(index, LANES), j)), align=4)
        return target.get_dummy_value()

    return types.void(source, at, stride, out, to), generate


def _exchange(builder: Any, rows: list[Any], half: int) -> list[Any]:
    """Return the rows with every pair of them, `half` apart, having swapped their off-diagonal halves."""

    def mask(lanes: list[int]) -> Any:
        return ir.Constant(ir.VectorType(ir.IntType(32), SQUARE), lanes)

    upper = mask([SQUARE + (lane ^ half) if lane & half else lane for lane in range(SQUARE)])
    lower = mask([SQUARE + lane if lane & half else lane | half for lane in range(SQUARE)])
    result = list(rows)
    for k in [k for k in range(SQUARE) if not k & half]:
        result[k] = builder.shuffle_vector(rows[k], rows[k | half], upper)
        result[k | half] = builder.shuffle_vector(rows[k], rows[k | half], lower)
    return result


@jit
def load(words, kind, block, count, raw, values, signs):  # type: ignore[no-untyped-def]
    """Write blocks of raw bits, seen as uint32 `words`, as magnitudes `[16 * LANES]` and sign bits of nibbles `[2 * LANES]`."""
    if count < LANES:
        raw[:] = np.uint32(0)
    step = GROUP_SIZE if kind == F32 else PAIRS
    whole = count // SQUARE * SQUARE
    for part in range(0, step, SQUARE):
        for lane in range(0, whole, SQUARE):
            _transpose(words, (block + lane) * step + part, step, raw, part * LANES + lane)
        for lane in range(whole, count):
            for j in range(SQUARE):
                raw[(part + j) * LANES + lane] = words[(block + lane) * step + part + j]
    if kind == F32:
        _take_words(raw, values, signs)
    else:
        _take_pairs(raw, values, signs)
        if kind != BF16:
            _widen(values)


@jit
def _take_words(raw, values, signs):  # type: ignore[no-untyped-def]
    signs[:] = np.uint32(0)
    for i in range(GROUP_SIZE):
        row, shift = i // PAIRS * LANES, np.uint32(28 - 4 * (i % PAIRS))
        for lane in range(LANES):
            word = raw[i * LANES + lane]
            values[i * LANES + lane] = float_of(np.uint32(word & _MAGNITUDE))
            signs[row + lane] |= (word & _HIGH_SIGN) >> shift


@jit
def _take_pairs(raw, values, signs):  # type: ignore[no-untyped-def]
    """Take two 16-bit values from each word, each to the upper half of its own."""
    signs[:] = np.uint32(0)
    for pair in range(PAIRS):
        row, place = pair // 4 * LANES, np.uint32(24 - 8 * (pair % 4))
        for lane in range(LANES):
            word = raw[pair * LANES + lane]
            values[2 * pair * LANES + lane] = float_of(np.uint32((word & _LOW) << np.uint32(16)))
            values[(2 * pair + 1) * LANES + lane] = float_of(np.uint32(word & _HIGH))
            both = (word & _HIGH_SIGN) | ((word & _LOW_SIGN) << np.uint32(12))
            signs[row + lane] |= both >> place


@jit
def _widen(values):  # type: ignore[no-untyped-def]
    """Turn float16 bits in the upper halves into float32."""
    for i in range(GROUP_SIZE * LANES):
        values[i] = float_of(np.uint32(bits_of(values[i]) >> np.uint32(3))) * F16_TO_F32


@jit
def find_largest(values, largest):  # type: ignore[no-untyped-def]
    """Write each block's largest magnitude."""
    for lane in range(LANES):
        found = values[lane]
        for i in range(1, GROUP_SIZE):
            value = values[i * LANES + lane]
            found = value if value > found else found
        largest[lane] = found


@jit
def store(words, signs, codes, count, packed, scales):  # type: ignore[no-untyped-def]
    """Write packed words and scale codes, giving each nibble that is not zero its sign."""
    for lane in range(count):
        packed[2 * lane] = words[lane] | (signs[lane] & nonzero_nibbles(words[lane]))
        packed[2 * lane + 1] = words[LANES + lane] | (signs[LANES + lane] & nonzero_nibbles(words[LANES + lane]))
    for lane in range(count):
        scales[lane] = codes[lane]


@jit
def measure(values, norms, nonzero):  # type: ignore[no-untyped-def]
    """Write each block's sum of squares, and how many of its values are not zero."""
    for lane in range(LANES):
        total = np.float32(0)
        for i in range(GROUP_SIZE):
            total += values[i * LANES + lane] * values[i * LANES + lane]
        norms[lane] = total
    for lane in range(LANES):
        found = np.int32(0)
        for i in range(GROUP_SIZE):
            found += np.int32(values[i * LANES + lane] > np.float32(0))
        nonzero[lane] = found


@jit
def tally(floats, words, codes, nonzero, totals, counts):  # type: ignore[no-untyped-def]
    """Add a chunk, lane by lane, to `totals[4 * LANES]` and `counts[3 * LANES]`: the seven numbers of TileStats.

    `floats` are each block's squared error, squared error by rounding, and sum of squares.
    """
    errors, rounding, norms = floats
    for lane in range(LANES):
        totals[lane] += np.float64(errors[lane])
        totals[LANES + lane] += np.float64(norms[lane])
        totals[2 * LANES + lane] += np.float64(rounding[lane])
    for lane in range(LANES):
        ratio = errors[lane] / (norms[lane] if norms[lane] > np.float32(0) else np.float32(1))
        worst = np.float32(totals[3 * LANES + lane])
        totals[3 * LANES + lane] = ratio if ratio > worst else worst
    for lane in range(LANES):
        stored = count_bits(nonzero_nibbles(words[lane])) + count_bits(nonzero_nibbles(words[LANES + lane]))
        counts[lane] += np.int32(nonzero[lane] - np.int32(stored))
        counts[LANES + lane] += np.int32(1 if codes[lane] == HIGHEST else 0)
        counts[2 * LANES + lane] += np.int32(1 if nonzero[lane] == 0 else 0)


@jit
def summarize(totals, counts, padding, stats):  # type: ignore[no-untyped-def]
    """Write the seven statistics of all lanes together, without the blocks that were only padding."""
    for lane in range(LANES):
        for number in range(3):
            stats[number] += totals[number * LANES + lane]
            stats[4 + number] += counts[number * LANES + lane]
        stats[3] = max(stats[3], totals[3 * LANES + lane])
    stats[3] = np.sqrt(stats[3])
    stats[6] -= padding
