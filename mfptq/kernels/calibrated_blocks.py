"""Quantize blocks of 16 by the calibrated methods: the arithmetic, once for every device, one block to a lane.

Called by the back ends, as `blocks.py`; the blocks of all lanes have the same columns, and so the same statistics. Sums run in
index order, and nothing is fused: the same bits as the torch kernel, at any global scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..dtypes import BF16, F32
from ..nvfp4 import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, ZERO_BLOCK_CODE
from .blocks import (
    F16_TO_F32,
    Block,
    BlockErrors,
    QuantizedBlock,
    block_errors,
    bounded,
    largest,
    nonzero_nibbles,
    round_e2m1,
    rounded_scale,
)
from .calibrated import CALIBRATED_OFFSETS, DESCENT, SWEEPS
from .vector import FLOAT, LONG, WORD, Code, Floats, Mask, Words

_SIGN, _MAGNITUDE = 0x80000000, 0x7FFFFFFF
_LOWEST_OFFSET = min(CALIBRATED_OFFSETS)  # `_place` has numbers from 0 to 15: offsets are counted from the lowest
_PLACES = [offset - _LOWEST_OFFSET for offset in CALIBRATED_OFFSETS]


class ColumnStatistics(NamedTuple):
    """A pointer to the statistics of a block's 16 columns: weights `[16]`, or a Hessian `[16, 16]`."""

    code: Code
    pointer: Any

    def weight(self, i: int) -> Floats:
        """Return column i's weight."""
        found: Floats = self.code.spread(self.code.load(self.code.at(self.pointer, LONG(i)), FLOAT, 4))
        return found

    def curvature(self, j: int, i: int) -> Floats:
        """Return an entry of the Hessian."""
        return self.weight(BLOCK_SIZE * j + i)


def signed_values(words: Sequence[Words], dtype: str) -> list[Floats]:
    """Return a block's values from its raw words: 16 of float32, or 8 that hold two values each, the first one low."""
    if dtype == F32:
        return [word.floats() for word in words]
    halves = [half for word in words for half in (word << 16, word & 0xFFFF0000)]
    return [half.floats() if dtype == BF16 else _widened(half) for half in halves]


def _widened(half: Words) -> Floats:
    """Return the float32 value of a float16 whose bits are the upper half."""
    magnitude = ((half & 0x7FFF0000) >> 3).floats() * F16_TO_F32
    return (magnitude.bits() | (half & _SIGN)).floats()


def _signed_e2m1(y: Floats) -> Floats:
    """Return y rounded to E2M1, clamped to +-6; its sign is kept, also that of zero."""
    magnitude = (y.bits() & _MAGNITUDE).floats().minimum(E2M1_MAX)
    return (round_e2m1(magnitude).bits() | (y.bits() & _SIGN)).floats()


def _magnitudes(x: Sequence[Floats]) -> list[Floats]:
    return [(each.bits() & _MAGNITUDE).floats() for each in x]


def calibrated_errors(x: Sequence[Floats], done: QuantizedBlock) -> BlockErrors:
    """Return what quantizing did to each block; descent may also give a value to what was zero."""
    sizes, places = _magnitudes(x), []
    for half in (0, 8):
        place = done.code & 0
        for i, size in enumerate(sizes[half : half + 8]):
            place = place | ((size > 0.0).count() << (4 * i + 3))
        places.append(place)
    return block_errors(Block(sizes, places[0].ones() + places[1].ones(), ()), done, places)


def _squares(differences: Sequence[Floats]) -> Floats:
    total = differences[0].code.floats(0.0)
    for each in differences:
        total = total + each * each
    return total


def _weighted(statistics: ColumnStatistics, differences: Sequence[Floats]) -> Floats:
    total = statistics.code.floats(0.0)
    for i, each in enumerate(differences):
        total = total + (statistics.weight(i) * each) * each
    return total


def _quadratic(statistics: ColumnStatistics, differences: Sequence[Floats]) -> Floats:
    """Return the sum over j of d_j * (sum over i < j of H_ji * 2 d_i, and H_jj * d_j): doubling is exact."""
    total, doubled = statistics.code.floats(0.0), list[Floats]()
    for j, own in enumerate(differences):
        inner = statistics.code.floats(0.0)
        for i, each in enumerate([*doubled, own]):
            inner = inner + statistics.curvature(j, i) * each
        total = total + own * inner
        doubled.append(own + own)
    return total


def calibrated(x: Sequence[Floats], global_scale: Floats, statistics: ColumnStatistics, method: str) -> QuantizedBlock:
    """Return each block at the scale of least error, the first of equals; by DESCENT, its values are then improved too."""
    scale, values = nearest(x, global_scale, statistics, method)
    return quantized(x, global_scale, scale, values)


def nearest(
    x: Sequence[Floats], global_scale: Floats, statistics: ColumnStatistics, method: str
) -> tuple[Words, list[Floats]]:
    """Return the scale of each block, as the bits of its E4M3 value, and its E2M1 values: of least error, as `calibrated`."""
    code = statistics.code
    step = code.floats(1.0) / global_scale
    base = _base(x, global_scale)
    chosen, best = code.variable(base), code.variable(code.floats(math.inf))
    objective = _weighted if method == "weighted" else _quadratic
    # A loop, not 14 copies: a GPU's driver translates them in seconds, and a processor is no faster with them.
    with code.loop(LONG(0), LONG(len(CALIBRATED_OFFSETS)), LONG(1)) as candidate:
        scale = bounded(base + (_place(code, candidate) << 20) - (-_LOWEST_OFFSET << 20))
        error = objective(statistics, differences(x, _rounded(x, scale, step), scale, step))
        better = error < best.get()
        chosen.set(better.choose(scale, chosen.get()))
        best.set(better.choose(error, best.get()))
    values = _rounded(x, chosen.get(), step)
    if method == DESCENT:
        values = _descended(x, values, chosen.get().floats() * step, statistics)
    return chosen.get(), values


def _place(code: Code, candidate: Any) -> Words:
    """Return the number of _PLACES at an index that the code computes, in every lane.

    They are the nibbles of one constant: no table in memory, which would differ between back ends.
    """
    assert len(_PLACES) <= 16 > max(_PLACES)
    nibbles = sum(number << (4 * place) for place, number in enumerate(_PLACES))
    found = code.build.lshr(LONG(nibbles), code.build.shl(candidate, LONG(2)))
    number: Words = code.spread(code.build.and_(code.build.trunc(found, WORD), WORD(15)))
    return number


def quantized(x: Sequence[Floats], global_scale: Floats, scale: Words, values: Sequence[Floats]) -> QuantizedBlock:
    """Return blocks whose scale and values were chosen, with their squared errors."""
    step = x[0].code.floats(1.0) / global_scale
    words = [_nibbles(values[half : half + 8]) for half in (0, 8)]
    empty = (words[0] | words[1]).equals(0)
    scale_code = empty.choose(ZERO_BLOCK_CODE, (scale >> 20) - 960)
    base = _base(x, global_scale)
    rounding = _squares(differences(x, _rounded(x, base, step), base, step))
    return QuantizedBlock(words, scale_code, _squares(differences(x, values, scale, step)), rounding)


def _base(x: Sequence[Floats], global_scale: Floats) -> Words:
    """Return each block's scale rounded to nearest."""
    return bounded(rounded_scale((largest(_magnitudes(x)) / E2M1_MAX * global_scale).minimum(E4M3_MAX)))


def _rounded(x: Sequence[Floats], scale: Words, step: Floats) -> list[Floats]:
    inverse = step.code.floats(1.0) / (scale.floats() * step)
    return [_signed_e2m1(each * inverse) for each in x]


def differences(x: Sequence[Floats], values: Sequence[Floats], scale: Words, step: Floats) -> list[Floats]:
    """Return how far values at a scale are from weights; `step` is 1 over the global scale."""
    factor = scale.floats() * step
    return [value * factor - each for value, each in zip(values, x, strict=True)]


def _descended(
    x: Sequence[Floats], values: Sequence[Floats], scale: Floats, statistics: ColumnStatistics
) -> list[Floats]:
    """Return values whose error was lowered one by one until nothing changed, at most 8 times through."""
    code = statistics.code
    inverse = code.floats(1.0) / scale
    gradient = [code.variable(code.floats(0.0)) for _ in x]
    held = [code.variable(value) for value in values]
    for i, (value, each) in enumerate(zip(values, x, strict=True)):
        _shift(gradient, value * scale - each, statistics, i)
    sweeps = code.variable(LONG(SWEEPS))
    with code.loop(LONG(0), sweeps, LONG(1)):
        moved = code.variable(code.words(0))
        for i in range(BLOCK_SIZE):
            change, lower = _move(held[i], gradient[i].get(), (scale, inverse), statistics.curvature(i, i))
            with code.build.if_then(code.build.not_(lower.nowhere())):
                moved.set(code.words(1))
                _shift(gradient, change, statistics, i)
        ended = moved.get().equals(0).everywhere()
        sweeps.set(code.build.select(ended, LONG(0), LONG(SWEEPS)))
    return [variable.get() for variable in held]


def _shift(gradient: Sequence[Any], change: Floats, statistics: ColumnStatistics, i: int) -> None:
    """Add to the gradient what a change of value i makes of it."""
    for j, each in enumerate(gradient):
        each.set(each.get() + statistics.curvature(j, i) * change)


def _move(held: Any, slope: Floats, scales: tuple[Floats, Floats], own: Floats) -> tuple[Floats, Mask]:
    """Move a value to where the error is least, if that lowers it; return the change, and where there was one."""
    scale, inverse = scales
    now = held.get() * scale
    value = _signed_e2m1((now - slope * (own.code.floats(1.0) / own)) * inverse)
    change = value * scale - now
    lower = change * (slope + slope + own * change) < 0.0
    held.set(lower.choose(value, held.get()))
    return lower.choose(change, 0.0), lower


def _nibbles(values: Sequence[Floats]) -> Words:
    """Return eight E2M1 values as nibbles, the first one lowest; a zero has no sign."""
    word, signs = values[0].bits() & 0, values[0].bits() & 0
    for i, each in enumerate(values):
        top = ((each.bits() >> 22) & 511).maximum(251)  # 0.5 has 252 there, 1 has 254, 6 has 259
        word = word | ((top - 251 - ((top + 2) >> 8)) << (4 * i))
        signs = signs | (((each.bits() >> 28) & 8) << (4 * i))
    return word | (signs & nonzero_nibbles(word))
