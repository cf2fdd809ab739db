"""The CPU kernel: numba, vectorized across blocks, compiled once and cached on disk.

Contraction and fast-math stay off: the same bytes on every machine. All functions release the interpreter lock.
"""

from __future__ import annotations

import math

import numpy as np

from ..nvfp4 import E4M3_MAX, GROUP_SIZE, INPUT_SCALE_NUMERATOR, SEARCH_OFFSETS, ByteArray
from . import STATISTICS, Recipe, Tile, TileStats
from .lanes import LANES, find_largest, load, measure, store, summarize, tally
from .pieces import (
    BF16,
    KINDS,
    ZERO_CODE,
    base_code,
    bits_of,
    e2m1_code,
    exact_product_add,
    float_of,
    jit,
    neighbour,
    round_e2m1,
    scale_code,
    scale_value,
)

_ONE, _SIX, _ZERO = np.float32(1), np.float32(6), np.float32(0)
_E4M3_MAX, _TWO_23 = np.float32(E4M3_MAX), np.float32(2.0**23)
# Rows of the workspace of floats, after the 16 of magnitudes.
_SCALE, _INVERSE, _ERROR, _BEST, _BASE, _CHOSEN = (row * LANES for row in range(GROUP_SIZE, GROUP_SIZE + 6))
ROWS = GROUP_SIZE + 6


@jit
def _start(floats, largest, global_scale):  # type: ignore[no-untyped-def]
    """Write each block's scale rounded to nearest, as the best so far; return whether none is too small for its block."""
    top = np.uint32(0)
    for lane in range(LANES):
        base = scale_value(base_code(largest[lane], global_scale))
        floats[_BASE + lane] = base
        floats[_CHOSEN + lane] = base
        floats[_BEST + lane] = np.float32(np.inf)
    for lane in range(LANES):
        top = max(top, bits_of(largest[lane]))
    return float_of(np.uint32(top)) * global_scale <= np.float32(INPUT_SCALE_NUMERATOR)


@jit
def _scale(floats, codes, global_scale, exact):  # type: ignore[no-untyped-def]
    """Write the candidate scales, `codes` (shifted left by 20) away from rounding."""
    step = _ONE / global_scale
    for lane in range(LANES):
        value = neighbour(floats[_BASE + lane], codes)
        scale = value * step if exact else value / global_scale
        floats[_SCALE + lane] = scale
        floats[_INVERSE + lane] = _ONE / scale


@jit
def _simple_errors(floats):  # type: ignore[no-untyped-def]
    """Write each block's squared error at its candidate, where no value exceeds 6 and value times scale is exact."""
    for lane in range(LANES):
        scale, inverse, total = floats[_SCALE + lane], floats[_INVERSE + lane], _ZERO
        for i in range(GROUP_SIZE):
            x = floats[i * LANES + lane]
            difference = exact_product_add(round_e2m1(x * inverse), scale, -x)
            total += difference * difference
        floats[_ERROR + lane] = total


@jit
def _errors(floats):  # type: ignore[no-untyped-def]
    """Write each block's squared error at its candidate, whatever the scale."""
    for lane in range(LANES):
        scale, inverse, total = floats[_SCALE + lane], floats[_INVERSE + lane], _ZERO
        for i in range(GROUP_SIZE):
            x = floats[i * LANES + lane]
            y = x * inverse
            difference = round_e2m1(y if y < _SIX else _SIX) * scale - x
            total += difference * difference
        floats[_ERROR + lane] = total


@jit
def _keep_better(floats, codes):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        error, best = floats[_ERROR + lane], floats[_BEST + lane]
        candidate, chosen = neighbour(floats[_BASE + lane], codes), floats[_CHOSEN + lane]
        better = error < best
        floats[_BEST + lane] = error if better else best
        floats[_CHOSEN + lane] = candidate if better else chosen


@jit
def _pack_search(floats, global_scale, words, codes):  # type: ignore[no-untyped-def]
    """Write each block's 16 codes as two words; an all-zero block gets 0x20."""
    for lane in range(LANES):
        floats[_INVERSE + lane] = _ONE / (floats[_CHOSEN + lane] / global_scale)
    _pack_half(floats[: 8 * LANES], floats[_INVERSE : _INVERSE + LANES], words[:LANES])
    _pack_half(floats[8 * LANES :], floats[_INVERSE : _INVERSE + LANES], words[LANES:])
    for lane in range(LANES):
        code = np.int32(bits_of(floats[_CHOSEN + lane]) >> np.uint32(20)) - np.int32(960)
        codes[lane] = code if (words[lane] | words[LANES + lane]) else ZERO_CODE


@jit
def _pack_half(values, inverses, words):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        inverse, word = inverses[lane], np.uint32(0)
        for i in range(8):
            y = values[i * LANES + lane] * inverse
            word |= e2m1_code(y if y < _SIX else _SIX) << np.uint32(4 * i)
        words[lane] = word


@jit
def _search(source, kind, global_scale, exact, out):  # type: ignore[no-untyped-def]
    """Quantize blocks of raw bits, seen as uint32; `exact`: the global scale is a power of two."""
    packed, scales, stats = out
    totals, counts = np.zeros(4 * LANES), np.zeros(3 * LANES, np.int32)
    raw, floats = np.empty(GROUP_SIZE * LANES, np.uint32), np.empty(ROWS * LANES, np.float32)
    signs, words = np.empty(2 * LANES, np.uint32), np.empty(2 * LANES, np.uint32)
    codes, nonzero = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    largest, rounding, norms = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    best = floats[_BEST : _BEST + LANES]
    for block in range(0, scales.size, LANES):
        count = min(LANES, scales.size - block)
        load(source, kind, block, count, raw, floats[: GROUP_SIZE * LANES], signs)
        find_largest(floats, largest)
        simple = _start(floats, largest, global_scale) and exact
        for offset in SEARCH_OFFSETS:
            codes_away = np.uint32(np.int32(offset) << np.int32(20))
            _scale(floats, codes_away, global_scale, exact)
            if simple and offset >= 0:
                _simple_errors(floats)
            else:
                _errors(floats)
            _keep_better(floats, codes_away)
            if offset == 0:
                rounding[:] = best
        _pack_search(floats, global_scale, words, codes)
        store(words, signs, codes, count, packed[2 * block :], scales[block:])
        measure(floats, norms, nonzero)
        tally((best, rounding, norms), words, codes, nonzero, totals, counts)
    summarize(totals, counts, -scales.size % LANES, stats)


@jit
def _minmax_scales(floats, largest, kind, global_scale, codes):  # type: ignore[no-untyped-def]
    """Compute compressed-tensors' scale of each block: amax / 6 rounded in the weight's dtype, then to E4M3."""
    for lane in range(LANES):
        sixth = largest[lane] / _SIX
        bits = bits_of(sixth)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        sixth = float_of(np.uint32(rounded & np.uint32(0xFFFF0000))) if kind == BF16 else sixth
        value = global_scale * sixth
        value = value if value < _E4M3_MAX else _E4M3_MAX
        steps = value * np.float32(512) + _TWO_23
        subnormal = value < np.float32(2.0**-6)
        normal = np.uint32(scale_code(value))
        code = np.uint32(bits_of(steps) & np.uint32(15)) if subnormal else normal
        scale = (steps - _TWO_23) * np.float32(2.0**-9) if subnormal else scale_value(normal)
        codes[lane] = code if code else ZERO_CODE
        floats[_SCALE + lane] = (scale if code else np.float32(0.125)) / global_scale


@jit
def _round_half(values, divisors, signs, words, errors):  # type: ignore[no-untyped-def]
    """Write 8 nibbles of each block, and add their squared errors; a value that is not zero keeps its sign."""
    for lane in range(LANES):
        divisor, word, total = divisors[lane], np.uint32(0), errors[lane]
        for i in range(8):
            x = values[i * LANES + lane]
            y = x / divisor
            negative = np.uint32(8 if y > _ZERO else 0)
            y = y if y < _SIX else _SIX
            word |= (e2m1_code(y) | negative) << np.uint32(4 * i)
            difference = round_e2m1(y) * divisor - x
            total += difference * difference
        words[lane] = word & (signs[lane] | np.uint32(0x77777777))
        errors[lane] = total


@jit
def _minmax(source, kind, global_scale, _exact, out):  # type: ignore[no-untyped-def]
    """Quantize blocks of raw bits, seen as uint32, with true divisions, as compressed-tensors does."""
    packed, scales, stats = out
    totals, counts = np.zeros(4 * LANES), np.zeros(3 * LANES, np.int32)
    raw, floats = np.empty(GROUP_SIZE * LANES, np.uint32), np.empty(ROWS * LANES, np.float32)
    signs, words = np.empty(2 * LANES, np.uint32), np.empty(2 * LANES, np.uint32)
    codes, nonzero = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    largest, norms = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    errors, divisors = floats[_ERROR : _ERROR + LANES], floats[_SCALE : _SCALE + LANES]
    for block in range(0, scales.size, LANES):
        count = min(LANES, scales.size - block)
        load(source, kind, block, count, raw, floats[: GROUP_SIZE * LANES], signs)
        find_largest(floats, largest)
        _minmax_scales(floats, largest, kind, global_scale, codes)
        errors[:] = _ZERO
        _round_half(floats[: 8 * LANES], divisors, signs[:LANES], words[:LANES], errors)
        _round_half(floats[8 * LANES :], divisors, signs[LANES:], words[LANES:], errors)
        for lane in range(count):
            packed[2 * (block + lane)] = words[lane]
            packed[2 * (block + lane) + 1] = words[LANES + lane]
        for lane in range(count):
            scales[block + lane] = codes[lane]
        measure(floats, norms, nonzero)
        tally((errors, errors, norms), words, codes, nonzero, totals, counts)
    summarize(totals, counts, -scales.size % LANES, stats)


@jit
def _amax(source, magnitude):  # type: ignore[no-untyped-def]
    """Return the largest magnitude's bits: integers order as the floats they stand for, NaN above infinity."""
    largest = source[0] & magnitude
    for i in range(source.size):
        largest = max(largest, source[i] & magnitude)
    return largest


class NumbaKernel:
    """Quantizes on the CPU; safe to use from several threads."""

    name = "numba"
    tile_bytes = 4 * 2**20

    def allocate(self, size: int) -> ByteArray:
        """Return `size` bytes of memory."""
        return np.empty(size, np.uint8)

    def amax(self, tile: Tile) -> float:
        """Return the largest magnitude; NaN or infinity anywhere in the tile is returned as such."""
        wide = tile.dtype.itemsize == 4
        bits = tile.reshape(-1).view(np.uint32 if wide else np.uint16)
        found = _amax(bits, np.uint32(0x7FFFFFFF) if wide else np.uint16(0x7FFF))
        if tile.dtype == np.uint16:
            return float(np.uint32(int(found) << 16).view(np.float32))
        return float(np.array([found], bits.dtype).view(tile.dtype)[0])

    def quantize(self, tile: Tile, recipe: Recipe, packed: ByteArray, scales: ByteArray) -> TileStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""
        run = _search if recipe.method == "search" else _minmax
        stats = np.zeros(STATISTICS)
        out = (packed.reshape(-1).view(np.uint32), scales.reshape(-1), stats)
        exact = math.frexp(recipe.global_scale)[0] == 0.5
        run(tile.reshape(-1).view(np.uint32), KINDS[tile.dtype.char], np.float32(recipe.global_scale), exact, out)
        return TileStats.from_array(tile.size, stats)
