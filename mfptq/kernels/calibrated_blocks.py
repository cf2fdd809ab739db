"""The arithmetic of the calibrated methods on blocks of 16, one row's block to a lane; all lanes share their columns' statistics.

Sums run in index order, and nothing is fused: the same bits as the torch kernel, at any global scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..kernels import BF16, F32
from ..nvfp4 import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, ZERO_BLOCK_CODE
from .blocks import (
    F16_TO_F32,
    Quantized,
    bounded,
    largest,
    neighbour,
    nonzero_nibbles,
    round_e2m1,
    rounded_scale,
)
from .calibrated import CALIBRATED_OFFSETS, SWEEPS
from .vector import FLOAT, LONG, Code, Floats, Mask, Words

_SIGN, _MAGNITUDE = 0x80000000, 0x7FFFFFFF


class Known(NamedTuple):
    """Pointers to what is known of a block's columns: weights `[16]`, or a Hessian `[16, 16]` and its lower factors."""

    code: Code
    weights: Any
    hessian: Any
    lower: Any

    def weight(self, i: int) -> Floats:
        """Return column i's weight."""
        return self._number(self.weights, i)

    def curvature(self, j: int, i: int) -> Floats:
        """Return an entry of the Hessian."""
        return self._number(self.hessian, BLOCK_SIZE * j + i)

    def factor(self, j: int, i: int) -> Floats:
        """Return an entry of the lower factors: of the Hessian, doubled off the diagonal."""
        return self._number(self.lower, BLOCK_SIZE * j + i)

    def _number(self, pointer: Any, place: int) -> Floats:
        found: Floats = self.code.spread(self.code.load(self.code.at(pointer, LONG(place)), FLOAT, 4))
        return found


def signed_values(words: Sequence[Words], kind: str) -> list[Floats]:
    """Return a block's values from its raw words: 16 of float32, or 8 that hold two values each, the first one low."""
    if kind == F32:
        return [word.floats() for word in words]
    halves = [half for word in words for half in (word << 16, word & 0xFFFF0000)]
    return [half.floats() if kind == BF16 else _widened(half) for half in halves]


def _widened(half: Words) -> Floats:
    """Return the float32 value of a float16 whose bits are the upper half."""
    magnitude = ((half & 0x7FFF0000) >> 3).floats() * F16_TO_F32
    return (magnitude.bits() | (half & _SIGN)).floats()


def _signed_e2m1(y: Floats) -> Floats:
    """Return y rounded to E2M1, clamped to +-6; its sign is kept, also that of zero."""
    magnitude = (y.bits() & _MAGNITUDE).floats().minimum(E2M1_MAX)
    return (round_e2m1(magnitude).bits() | (y.bits() & _SIGN)).floats()


def _squares(differences: Sequence[Floats]) -> Floats:
    total = differences[0].code.floats(0.0)
    for each in differences:
        total = total + each * each
    return total


def _weighted(known: Known, differences: Sequence[Floats]) -> Floats:
    total = known.code.floats(0.0)
    for i, each in enumerate(differences):
        total = total + (known.weight(i) * each) * each
    return total


def _quadratic(known: Known, differences: Sequence[Floats]) -> Floats:
    total = known.code.floats(0.0)
    for j, own in enumerate(differences):
        inner = known.code.floats(0.0)
        for i in range(j + 1):
            inner = inner + known.factor(j, i) * differences[i]
        total = total + own * inner
    return total


def calibrated(x: Sequence[Floats], global_scale: Floats, known: Known, method: str) -> Quantized:
    """Return each block at the scale of least error, by `weighted`, `hessian` or, with descent on its values, `descent`."""
    code = known.code
    step = code.floats(1.0) / global_scale
    magnitudes = [(each.bits() & _MAGNITUDE).floats() for each in x]
    base = bounded(rounded_scale((largest(magnitudes) / E2M1_MAX * global_scale).minimum(E4M3_MAX)))
    chosen, best, rounding = base, code.floats(math.inf), _rounding_error(x, base, step)
    objective = _weighted if method == "weighted" else _quadratic
    for offset in CALIBRATED_OFFSETS:
        scale = neighbour(base, offset)
        error = objective(known, _differences(x, _rounded(x, scale, step), scale, step))
        better = error < best
        best, chosen = better.choose(error, best), better.choose(scale, chosen)
    values = _rounded(x, chosen, step)
    if method == "descent":
        values = _descended(x, values, chosen.floats() * step, known)
    words = [_nibbles(values[half : half + 8]) for half in (0, 8)]
    empty = (words[0] | words[1]).equals(0)
    scale_code = empty.choose(ZERO_BLOCK_CODE, (chosen >> 20) - 960)
    return Quantized(words, scale_code, _squares(_differences(x, values, chosen, step)), rounding)


def _rounding_error(x: Sequence[Floats], base: Words, step: Floats) -> Floats:
    """Return the squared error of a block at its scale rounded to nearest."""
    return _squares(_differences(x, _rounded(x, base, step), base, step))


def _rounded(x: Sequence[Floats], scale: Words, step: Floats) -> list[Floats]:
    inverse = step.code.floats(1.0) / (scale.floats() * step)
    return [_signed_e2m1(each * inverse) for each in x]


def _differences(x: Sequence[Floats], values: Sequence[Floats], scale: Words, step: Floats) -> list[Floats]:
    factor = scale.floats() * step
    return [value * factor - each for value, each in zip(values, x, strict=True)]


def _descended(x: Sequence[Floats], values: Sequence[Floats], scale: Floats, known: Known) -> list[Floats]:
    """Return values whose error was lowered one by one until nothing changed, at most 8 times through."""
    code = known.code
    inverse = code.floats(1.0) / scale
    gradient = [code.variable(code.floats(0.0)) for _ in x]
    held = [code.variable(value) for value in values]
    for i, (value, each) in enumerate(zip(values, x, strict=True)):
        _shift(gradient, value * scale - each, known, i)
    sweeps = code.variable(LONG(SWEEPS))
    with code.loop(LONG(0), sweeps, LONG(1)):
        moved = code.variable(code.words(0))
        for i in range(BLOCK_SIZE):
            change, lower = _move(held[i], gradient[i].get(), (scale, inverse), known.curvature(i, i))
            with code.build.if_then(code.build.not_(lower.nowhere())):
                moved.set(code.words(1))
                _shift(gradient, change, known, i)
        ended = moved.get().equals(0).everywhere()
        sweeps.set(code.build.select(ended, LONG(0), LONG(SWEEPS)))
    return [variable.get() for variable in held]


def _shift(gradient: Sequence[Any], change: Floats, known: Known, i: int) -> None:
    """Add to the gradient what a change of value i makes of it."""
    for j, each in enumerate(gradient):
        each.set(each.get() + known.curvature(j, i) * change)


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
