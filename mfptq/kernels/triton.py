"""The kernels in Triton, for NVIDIA GPUs: one for each method, the same bytes as numba's.

One lane is one block of 16. Floating-point contraction is off, divisions are correctly rounded, and sums run in index order.
Values are loaded where they are used: to the compiler, which keeps them in registers, repeated loads are one.
"""

from __future__ import annotations

import triton
import triton.language as tl

_E4M3_MAX: tl.constexpr = tl.constexpr(448.0)
_TWO_22: tl.constexpr = tl.constexpr(4194304.0)
_TWO_23: tl.constexpr = tl.constexpr(8388608.0)
_F16_TO_F32: tl.constexpr = tl.constexpr(2.0**112)


@triton.jit
def _word(source, lane, mask, i: tl.constexpr, kind: tl.constexpr):
    """Load the uint32 that holds element i; repeated loads are one load to the compiler."""
    if kind == 2:
        return tl.load(source + lane * 16 + i, mask, other=0)
    return tl.load(source + lane * 8 + i // 2, mask, other=0)


@triton.jit
def _magnitude(source, lane, mask, i: tl.constexpr, kind: tl.constexpr):
    word = _word(source, lane, mask, i, kind)
    if kind == 2:
        return (word & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    half = (word >> (16 * (i % 2))) & 0x7FFF
    if kind == 0:
        return (half << 16).to(tl.float32, bitcast=True)
    return (half << 13).to(tl.float32, bitcast=True) * _F16_TO_F32


@triton.jit
def _negative(source, lane, mask, i: tl.constexpr, kind: tl.constexpr):
    """Return bit 3 set where element i is negative."""
    word = _word(source, lane, mask, i, kind)
    place: tl.constexpr = 31 if kind == 2 else 15 + 16 * (i % 2)
    return ((word >> place) & 1) << 3


@triton.jit
def _grid(y):
    """Return 2**22 times the power of two at or below max(y, 1), which rounds y to E2M1's step when it is added."""
    bits = (tl.maximum(y, 1.0)).to(tl.int32, bitcast=True)
    return ((bits & 0x7F800000) + (22 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _round_e2m1(y):
    grid = _grid(y)
    return (y + grid) - grid


@triton.jit
def _e2m1_code(y):
    grid = _grid(y)
    octave = grid.to(tl.int32, bitcast=True) >> 22
    return ((y + grid).to(tl.int32, bitcast=True) + octave + 6) & 7


@triton.jit
def _scale_code(value):
    """Return the E4M3 code of a value in the normal range; below it, some code < 8."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960


@triton.jit
def _scale_value(code):
    return ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _bounded(code):
    return tl.minimum(tl.maximum(code, 8), 126)


@triton.jit
def _measure(source, lane, mask, kind: tl.constexpr):
    """Return each block's largest magnitude, its sum of squares, and how many values are not zero."""
    largest = _magnitude(source, lane, mask, 0, kind)
    norm = largest * largest
    nonzero = (largest > 0).to(tl.int32)
    for i in tl.static_range(1, 16):
        x = _magnitude(source, lane, mask, i, kind)
        largest = tl.maximum(largest, x)
        norm = norm + x * x
        nonzero += (x > 0).to(tl.int32)
    return largest, norm, nonzero


@triton.jit
def _candidate(source, lane, mask, base, offset: tl.constexpr, global_scale, best, chosen, kind: tl.constexpr):  # noqa: PLR0913
    """Return the better of the best so far and the scale `base + offset`."""
    code = _bounded(base + offset)
    scale = tl.div_rn(_scale_value(code), global_scale)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    error = tl.zeros(scale.shape, tl.float32)
    for i in tl.static_range(16):
        x = _magnitude(source, lane, mask, i, kind)
        difference = _round_e2m1(tl.minimum(x * inverse, 6.0)) * scale - x
        error = error + difference * difference
    better = error < best
    return tl.where(better, error, best), tl.where(better, code, chosen)


@triton.jit
def _tally(stats, error, rounding, measured, zeroed, code, mask):
    """Write the seven numbers of TileStats for this program's blocks."""
    _, norm, nonzero = measured
    place = stats + tl.program_id(0) * 7
    worst = tl.where(norm > 0, error / tl.where(norm > 0, norm, 1.0), 0.0)
    tl.store(place, tl.sum(tl.where(mask, error, 0.0).to(tl.float64)))
    tl.store(place + 1, tl.sum(norm.to(tl.float64)))
    tl.store(place + 2, tl.sum(tl.where(mask, rounding, 0.0).to(tl.float64)))
    tl.store(place + 3, tl.max(tl.where(mask, worst, 0.0)).to(tl.float64))
    tl.store(place + 4, tl.sum(zeroed).to(tl.float64))
    tl.store(place + 5, tl.sum((mask & (code == 126)).to(tl.int32)).to(tl.float64))
    tl.store(place + 6, tl.sum((mask & (nonzero == 0)).to(tl.int32)).to(tl.float64))


@triton.jit
def search(source, packed, scales, stats, blocks, global_scale, kind: tl.constexpr, lanes: tl.constexpr):
    """Quantize blocks, seen as int32 words, to the least squared error; grid: one program for every `lanes` blocks."""
    lane = tl.program_id(0) * lanes + tl.arange(0, lanes)
    mask = lane < blocks
    measured = _measure(source, lane, mask, kind)
    largest, _, nonzero = measured
    gs = tl.full(largest.shape, 0.0, tl.float32) + global_scale
    sixth = tl.div_rn(largest, tl.full(largest.shape, 6.0, tl.float32))
    base = _bounded(_scale_code(tl.minimum(sixth * gs, _E4M3_MAX)))
    best = tl.full(largest.shape, float("inf"), tl.float32)
    best, chosen = _candidate(source, lane, mask, base, 0, gs, best, base, kind)
    rounding = best
    best, chosen = _candidate(source, lane, mask, base, -1, gs, best, chosen, kind)
    best, chosen = _candidate(source, lane, mask, base, 1, gs, best, chosen, kind)
    best, chosen = _candidate(source, lane, mask, base, 5, gs, best, chosen, kind)
    best, chosen = _candidate(source, lane, mask, base, 4, gs, best, chosen, kind)
    best, chosen = _candidate(source, lane, mask, base, 6, gs, best, chosen, kind)
    best, chosen = _candidate(source, lane, mask, base, 3, gs, best, chosen, kind)
    best, chosen = _candidate(source, lane, mask, base, -2, gs, best, chosen, kind)
    best, chosen = _candidate(source, lane, mask, base, 2, gs, best, chosen, kind)
    best, chosen = _candidate(source, lane, mask, base, 7, gs, best, chosen, kind)
    inverse = tl.div_rn(tl.full(gs.shape, 1.0, tl.float32), tl.div_rn(_scale_value(chosen), gs))
    low, high = tl.zeros(gs.shape, tl.int32), tl.zeros(gs.shape, tl.int32)
    stored = tl.zeros(gs.shape, tl.int32)
    for i in tl.static_range(16):
        y = tl.minimum(_magnitude(source, lane, mask, i, kind) * inverse, 6.0)
        value = _e2m1_code(y)
        stored += (value > 0).to(tl.int32)
        nibble = value | tl.where(value > 0, _negative(source, lane, mask, i, kind), 0)
        if i < 8:
            low |= nibble << (4 * i)
        else:
            high |= nibble << (4 * (i - 8))
    code = tl.where(stored > 0, chosen, 0x20)
    tl.store(packed + lane * 2, low, mask)
    tl.store(packed + lane * 2 + 1, high, mask)
    tl.store(scales + lane, code.to(tl.uint8), mask)
    _tally(stats, best, rounding, measured, nonzero - stored, code, mask)


@triton.jit
def minmax(source, packed, scales, stats, blocks, global_scale, kind: tl.constexpr, lanes: tl.constexpr):
    """Quantize blocks, seen as int32 words, as compressed-tensors does; grid: one program for every `lanes` blocks."""
    lane = tl.program_id(0) * lanes + tl.arange(0, lanes)
    mask = lane < blocks
    measured = _measure(source, lane, mask, kind)
    largest, _, nonzero = measured
    gs = tl.full(largest.shape, 0.0, tl.float32) + global_scale
    sixth = tl.div_rn(largest, tl.full(largest.shape, 6.0, tl.float32))
    if kind == 0:
        bits = sixth.to(tl.int32, bitcast=True)
        sixth = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    value = tl.minimum(gs * sixth, _E4M3_MAX)
    steps = (value * 512.0 + _TWO_23) - _TWO_23
    subnormal = value < 0.015625
    code = tl.where(subnormal, steps.to(tl.int32), _scale_code(value))
    scale = tl.where(subnormal, steps * 0.001953125, _scale_value(code))
    scale = tl.where(code == 0, 0.125, scale)
    code = tl.where(code == 0, 0x20, code)
    divisor = tl.div_rn(scale, gs)
    low, high = tl.zeros(gs.shape, tl.int32), tl.zeros(gs.shape, tl.int32)
    stored = tl.zeros(gs.shape, tl.int32)
    error = tl.zeros(gs.shape, tl.float32)
    for i in tl.static_range(16):
        x = _magnitude(source, lane, mask, i, kind)
        quotient = tl.div_rn(x, divisor)
        y = tl.minimum(quotient, 6.0)
        difference = _round_e2m1(y) * divisor - x
        error = error + difference * difference
        magnitude = _e2m1_code(y)
        stored += (magnitude > 0).to(tl.int32)
        nibble = magnitude | tl.where(quotient > 0, _negative(source, lane, mask, i, kind), 0)
        if i < 8:
            low |= nibble << (4 * i)
        else:
            high |= nibble << (4 * (i - 8))
    tl.store(packed + lane * 2, low, mask)
    tl.store(packed + lane * 2 + 1, high, mask)
    tl.store(scales + lane, code.to(tl.uint8), mask)
    _tally(stats, error, error, measured, nonzero - stored, code, mask)
