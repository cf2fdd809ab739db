"""Descent on the values of a block under its local Hessian, vectorized across rows (the last step of `hessian+`)."""

from __future__ import annotations

import numpy as np

from ..nvfp4 import GROUP_SIZE
from .calibrated import SWEEPS
from .pieces import bits_of, float_of, inline, jit, round_e2m1
from .rows import LANES, ONE, SIX, ZERO

_SIGN = np.uint32(0x80000000)


@inline
def signed_e2m1(y):  # type: ignore[no-untyped-def]
    """Round y to E2M1, clamped to +-6; its sign is kept, also that of zero."""
    bits = bits_of(y)
    magnitude = float_of(np.uint32(bits & np.uint32(0x7FFFFFFF)))
    rounded = round_e2m1(magnitude if magnitude < SIX else SIX)
    return float_of(np.uint32(bits_of(rounded) | (bits & _SIGN)))


@jit
def descend(values, hessian, scales, inverses, lanes, rounded, gradient):  # type: ignore[no-untyped-def]
    """Lower the error value by value until nothing changes, at most 8 times through."""
    changes = np.empty(LANES, np.float32)
    for j in range(GROUP_SIZE):
        for lane in range(lanes):
            gradient[j * LANES + lane] = ZERO
    for i in range(GROUP_SIZE):
        for lane in range(lanes):
            changes[lane] = rounded[i * LANES + lane] * scales[lane] - values[i * LANES + lane]
        _shift(hessian, i, changes, lanes, gradient)
    for _ in range(SWEEPS):
        changed = 0
        for i in range(GROUP_SIZE):
            if _step(i, hessian[i, i], scales, inverses, lanes, rounded, gradient, changes):
                changed += 1
                _shift(hessian, i, changes, lanes, gradient)
        if changed == 0:
            break


@jit
def _shift(hessian, i, changes, lanes, gradient):  # type: ignore[no-untyped-def]
    """Add to the gradient what changes of value i make of it."""
    for j in range(GROUP_SIZE):
        factor = hessian[j, i]
        for lane in range(lanes):
            gradient[j * LANES + lane] += factor * changes[lane]


@jit
def _step(i, own, scales, inverses, lanes, rounded, gradient, changes):  # type: ignore[no-untyped-def]
    """Move value i of each lane to where the error is least, if that lowers it; return how many moved."""
    inverse_own = ONE / own
    moved = np.int32(0)
    for lane in range(lanes):
        now = rounded[i * LANES + lane] * scales[lane]
        slope = gradient[i * LANES + lane]
        value = signed_e2m1((now - slope * inverse_own) * inverses[lane])
        change = value * scales[lane] - now
        gain = change * (slope + slope + own * change)
        lower = gain < ZERO
        changes[lane] = change if lower else ZERO
        rounded[i * LANES + lane] = value if lower else rounded[i * LANES + lane]
        moved += np.int32(1) if lower else np.int32(0)
    return moved
