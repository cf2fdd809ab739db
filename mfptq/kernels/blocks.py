"""Quantize blocks of 16 by `search` and `minmax`: the arithmetic, once for every device, one block to a lane.

Called by the back ends (`cpu_code.py`, `ptx.py`), which load a block's words and store what it becomes: two words of nibbles,
an E4M3 code, and its share of the error statistics. Sums over a block run in index order: another order has other bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..dtypes import BF16, F32
from ..nvfp4 import (
    BLOCK_SIZE,
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MAX_CODE,
    INPUT_SCALE_NUMERATOR,
    MIN_NORMAL_CODE,
    SEARCH_OFFSETS,
    ZERO_BLOCK_CODE,
)
from .vector import DOUBLE, Code, Floats, Words

_STEP = 20  # one E4M3 code further is bit 20 of the float32 that it stands for
_BIAS = 960  # the code of a normal E4M3 value is its float32 bits >> 20, less this
_LOWEST, _HIGHEST = ((code + _BIAS) << _STEP for code in (MIN_NORMAL_CODE, E4M3_MAX_CODE))
_GRID = 2.0**22
_CODED_GRID = _GRID + 1  # adds two steps: with the exponent's last bits, those of the octaves below
F16_TO_F32 = 2.0**112  # a float16's exponent and mantissa, at float32's places, are this much too small


class Block(NamedTuple):
    """A block for each lane: 16 magnitudes, how many are not 0, and sign bits of the first and of the last eight nibbles."""

    x: Sequence[Floats]
    present: Words
    signs: Sequence[Words]


class QuantizedBlock(NamedTuple):
    """What a block becomes: two words of nibbles, its scale code, and the squared errors of the choice and of rounding."""

    words: Sequence[Words]
    code: Words
    error: Floats
    rounding: Floats


class BlockErrors(NamedTuple):
    """A block's share of ErrorStats: sums of float32, the worst squared relative error, and counts."""

    sums: Sequence[Floats]
    worst: Floats
    counts: Sequence[Words]


def block_words(dtype: str) -> int:
    """Return how many 32-bit words a block of 16 takes."""
    return BLOCK_SIZE if dtype == F32 else BLOCK_SIZE // 2


def unpack_block(words: Sequence[Words], dtype: str) -> Block:
    """Return a block's values from its raw words: 16 of float32, or 8 that hold two values each, the first one low."""
    if dtype == F32:
        x = [(word & 0x7FFFFFFF).floats() for word in words]
        return Block(x, present(x), [_signs(words[half : half + 8], (31,)) for half in (0, 8)])
    magnitudes = [word & 0x7FFF7FFF for word in words]
    halves = [half for both in magnitudes for half in (both << 16, both & 0xFFFF0000)]
    x = [half.floats() if dtype == BF16 else (half >> 3).floats() * F16_TO_F32 for half in halves]
    found = words[0] & 0
    for i, both in enumerate(magnitudes):  # a sum reaches bit 15 or 31 where its half is not zero
        found = ((both + 0x7FFF7FFF) >> i) & (0x80008000 >> i) | found
    return Block(x, found.ones(), [_signs(words[half : half + 4], (15, 31)) for half in (0, 4)])


def _signs(words: Sequence[Words], bits: Sequence[int]) -> Words:
    """Return sign bits where eight nibbles have them, from words whose signs, in the order of values, are those bits."""
    found = words[0] & 0
    for number, bit in enumerate(bits):
        for i, word in enumerate(words):
            place = 4 * (len(bits) * i + number) + 3
            moved = word >> (bit - place) if bit >= place else word << (place - bit)
            found = moved & (1 << place) | found
    return found


def present(x: Sequence[Floats]) -> Words:
    """Return how many magnitudes are not zero."""
    found = x[0].bits() & 0
    for each in x:
        found = found + (each > 0.0).count()
    return found


def round_e2m1(y: Floats) -> Floats:
    """Return y in [0, 7) rounded to E2M1, ties to even.

    With t = max(y, 1), y + t * 2**22 has the last place of E2M1's step at y; any tie has an even t * 2**22.
    """
    t = y.maximum(1.0)
    return t.exact_times(-_GRID, t.exact_times(_GRID, y))


def on_grid(y: Floats) -> tuple[Words, Floats]:
    """Return (bits whose last three are the code 0..7, the value) of y in [0, 6] rounded to E2M1, ties to even.

    Added to 2**22 times its octave, y is rounded to E2M1's step there, and the sum's last bits count such steps; the
    code has two more for each octave above the first: the exponent's last bits.
    """
    octave = y.maximum(1.0).bits() & 0x7F800000
    found = octave.floats().exact_times(_CODED_GRID, y)
    return found.bits() + (octave >> 22), octave.floats().exact_times(-_CODED_GRID, found)


def rounded_scale(value: Floats) -> Words:
    """Return the bits of a value up to 448 rounded to E4M3, nearest, ties to even, where that is a normal number."""
    bits = value.bits()  # half of the last place, less one where the number before is even, carries where it must
    return (bits + 0x7FFFF + ((bits >> _STEP) & 1)) & 0xFFF00000


def bounded(scale: Words) -> Words:
    """Return the nearest scale that `search` uses, as bits: no subnormal, no NaN."""
    return scale.minimum(_HIGHEST).maximum(_LOWEST)


def neighbour(scale: Words, offset: int) -> Words:
    """Return the scale so many codes further, within what `search` uses, as bits."""
    if offset < 0:
        return (scale - (-offset << _STEP)).maximum(_LOWEST)
    return (scale + (offset << _STEP)).minimum(_HIGHEST) if offset else scale


def largest(x: Sequence[Floats]) -> Floats:
    """Return each block's largest magnitude."""
    found = x[0]
    for each in x[1:]:
        found = each.maximum(found)
    return found


def search(code: Code, block: Block, global_scale: Floats) -> QuantizedBlock:
    """Return each block at the scale of least squared error, of those near to rounding; the first of equals."""
    top = largest(block.x)
    base = bounded(rounded_scale((top / E2M1_MAX * global_scale).minimum(E4M3_MAX)))
    # Two programs for the error, of the same result: the first takes 7 % less time (AMD EPYC), and is the usual one.
    power_of_two = (global_scale.bits() & 0x7FFFFF).equals(0)
    simple = ((top * global_scale) <= INPUT_SCALE_NUMERATOR) & power_of_two
    found = [code.variable(each) for each in (base, top, top)]
    with code.build.if_else(simple.everywhere()) as (then, otherwise):
        with then:
            _set(found, _least(block, base, _simple_error(global_scale)))
        with otherwise:
            _set(found, _least(block, base, _any_error(global_scale)))
    scale, error, rounding = (each.get() for each in found)
    inverse = code.floats(1.0) / (scale.floats() / global_scale)
    codes = [on_grid((x * inverse).minimum(E2M1_MAX))[0] for x in block.x]
    words = [_nibbles(codes[half : half + 8]) for half in (0, 8)]
    empty = (words[0] | words[1]).equals(0)
    words = [word | (sign & nonzero_nibbles(word)) for word, sign in zip(words, block.signs, strict=True)]
    return QuantizedBlock(words, empty.choose(ZERO_BLOCK_CODE, (scale >> _STEP) - _BIAS), error, rounding)


def _set(variables: Sequence, values: Sequence) -> None:  # type: ignore[type-arg]
    for variable, value in zip(variables, values, strict=True):
        variable.set(value)


def _least(block: Block, base: Words, error_at: Callable[[Block, Floats, int], Floats]) -> tuple[Words, Floats, Floats]:
    """Return the scale of least error, its error, and the error of rounding, which is what the first offset is."""
    chosen, best, rounding = base, base.code.floats(math.inf), base.code.floats(math.inf)
    for offset in SEARCH_OFFSETS:
        scale = neighbour(base, offset)
        error = error_at(block, scale.floats(), offset)
        better = error < best
        best, chosen = better.choose(error, best), better.choose(scale, chosen)
        rounding = best if offset == 0 else rounding
    return chosen, best, rounding


def _simple_error(global_scale: Floats) -> Callable[[Block, Floats, int], Floats]:
    """Return the error at a scale where value times scale is exact and rounding a block's scale takes nothing above 6."""
    one = global_scale.code.floats(1.0)
    step = one / global_scale

    def error(block: Block, value: Floats, offset: int) -> Floats:
        scale = value * step
        inverse, total = one / scale, one * 0.0
        for x in block.x:
            y = x * inverse if offset >= 0 else (x * inverse).minimum(E2M1_MAX)
            difference = round_e2m1(y).exact_times(scale, -x)
            total = total + difference * difference
        return total

    return error


def _any_error(global_scale: Floats) -> Callable[[Block, Floats, int], Floats]:
    """Return the error at a scale, whatever the global scale."""
    one = global_scale.code.floats(1.0)

    def error(block: Block, value: Floats, _offset: int) -> Floats:
        scale = value / global_scale
        inverse, total = one / scale, one * 0.0
        for x in block.x:
            difference = round_e2m1((x * inverse).minimum(E2M1_MAX)) * scale - x
            total = total + difference * difference
        return total

    return error


def _nibbles(codes: Sequence[Words]) -> Words:
    """Return the last three bits of eight words as nibbles, the first one lowest."""
    word = codes[0] & 0
    for each in reversed(codes):
        word = (each & 7) | (word << 4)
    return word


def minmax(code: Code, block: Block, global_scale: Floats, dtype: str) -> QuantizedBlock:
    """Return each block as compressed-tensors quantizes it: amax / 6 in the weight's dtype, then to E4M3."""
    sixth = largest(block.x) / E2M1_MAX
    if dtype == BF16:  # round to nearest, ties to even
        bits = sixth.bits()
        sixth = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).floats()
    value = (global_scale * sixth).minimum(E4M3_MAX)
    steps = value * 512.0 + 2.0**23  # subnormal scales are multiples of 2**-9: the sum's last bits count them
    subnormal, normal = value < 2.0**-6, rounded_scale(value)
    scale_code = subnormal.choose(steps.bits() & 15, (normal >> _STEP) - _BIAS)
    scale = subnormal.choose((steps - 2.0**23) * 2.0**-9, normal.floats())
    none = scale_code.equals(0)
    scale_code, scale = none.choose(ZERO_BLOCK_CODE, scale_code), none.choose(0.125, scale)
    divisor = scale / global_scale
    words, error = [], code.floats(0.0)
    for half, signs in zip((0, 8), block.signs, strict=True):
        codes, kept = [], code.words(0x77777777)
        for i, x in enumerate(block.x[half : half + 8]):
            y = x / divisor
            kept = (y > 0.0).choose(kept | (8 << (4 * i)), kept)  # what becomes zero keeps its sign, unless it was zero
            found, rounded = on_grid(y.minimum(E2M1_MAX))
            codes.append(found)
            difference = rounded * divisor - x
            error = error + difference * difference
        words.append(_nibbles(codes) | (signs & kept))
    return QuantizedBlock(words, scale_code, error, error)


def nonzero_nibbles(word: Words) -> Words:
    """Return bit 3 of each nibble set where its magnitude, bits 0 to 2, is not zero."""
    return ((word | (word << 1) | (word << 2)) & 0x44444444) << 1


def block_errors(
    block: Block, done: QuantizedBlock, places: Sequence[Words | int] = (0x88888888, 0x88888888)
) -> BlockErrors:
    """Return what quantizing did to each block; `places` has bit 3 of the nibbles whose values may have been not zero."""
    norm = done.error.code.floats(0.0)
    for x in block.x:
        norm = norm + x * x
    worst = done.error / (norm > 0.0).choose(norm, 1.0)
    low, high = (nonzero_nibbles(word) & place for word, place in zip(done.words, places, strict=True))
    stored = (low | (high >> 1)).ones()
    counts = (block.present - stored, done.code.equals(E4M3_MAX_CODE).count(), block.present.equals(0).count())
    return BlockErrors((done.error, norm, done.rounding), worst, counts)


class ErrorSums:
    """The statistics of all blocks that a lane, or a thread, has dealt with."""

    def __init__(self, code: Code) -> None:
        self._code = code
        self._sums = [code.variable(code.constant(DOUBLE, 0.0)) for _ in range(3)]
        self._worst = code.variable(code.floats(0.0))
        self._counts = [code.variable(code.words(0)) for _ in range(3)]

    def add(self, found: BlockErrors) -> None:
        """Take in a block."""
        for held, value in zip(self._sums, found.sums, strict=True):
            held.set(self._code.build.fadd(held.get(), value.doubles()))
        self._worst.set(found.worst.maximum(self._worst.get()))
        for held, count in zip(self._counts, found.counts, strict=True):
            held.set(held.get() + count)

    def doubles(self) -> list[Any]:
        """Return the seven numbers of ErrorStats as float64, the worst relative error still squared."""
        wide = self._code.typed(DOUBLE)
        counts = [self._code.build.uitofp(held.get().raw, wide) for held in self._counts]
        return [*(held.get() for held in self._sums), self._worst.get().doubles(), *counts]
