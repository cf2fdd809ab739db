"""The CPU kernel: numba, vectorized across blocks, compiled once and cached on disk.

A chunk of 256 blocks is transposed into `magnitudes[16, 256]`, so that each instruction works on the same element of
several blocks and every block's sum still runs in index order. Contraction and fast-math stay off: the same bytes on every
machine. All functions release the interpreter lock.
"""

from __future__ import annotations

import numpy as np

from ..nvfp4 import E4M3_MAX, GROUP_SIZE, SEARCH_OFFSETS, ByteArray
from . import STATISTICS, Recipe, Tile, TileStats
from .pieces import (
    BF16,
    F16,
    F16_TO_F32,
    F32,
    HIGHEST,
    KINDS,
    LOWEST,
    ZERO_CODE,
    base_code,
    bits_of,
    bounded,
    count_bits,
    e2m1_code,
    float_of,
    jit,
    nonzero_nibbles,
    round_e2m1,
    scale_code,
    scale_value,
)

CHUNK = 256
_MAGNITUDE = np.uint32(0x7FFFFFFF)


@jit
def _load(source, kind, start, count, magnitudes, signs):  # type: ignore[no-untyped-def]
    """Transpose blocks of raw bits into magnitudes and, in two words a block, the sign bits of their nibbles."""
    shift = np.uint32(31 if kind == F32 else 15)
    for block in range(count):
        for half in range(2):
            word = np.uint32(0)
            for i in range(8):
                raw = np.uint32(source[(start + block) * GROUP_SIZE + half * 8 + i])
                word |= (raw >> shift) << np.uint32(4 * i + 3)
                if kind == BF16:
                    magnitude = float_of(np.uint32((raw & np.uint32(0x7FFF)) << np.uint32(16)))
                elif kind == F16:
                    magnitude = float_of(np.uint32((raw & np.uint32(0x7FFF)) << np.uint32(13))) * F16_TO_F32
                else:
                    magnitude = float_of(np.uint32(raw & _MAGNITUDE))
                magnitudes[half * 8 + i, block] = magnitude
            signs[half, block] = word


@jit
def _largest(magnitudes, count, largest):  # type: ignore[no-untyped-def]
    for block in range(count):
        value = magnitudes[0, block]
        for i in range(1, GROUP_SIZE):
            value = max(value, magnitudes[i, block])
        largest[block] = value


@jit
def _start(largest, global_scale, count, base, best, codes):  # type: ignore[no-untyped-def]
    for block in range(count):
        base[block] = base_code(largest[block], global_scale)
        best[block] = np.float32(np.inf)
        codes[block] = base[block]


@jit
def _try_offset(magnitudes, base, offset, step, count, best, codes):  # type: ignore[no-untyped-def]
    """Keep, for each block, the candidate scale `base + offset` if its squared error is below the best so far."""
    for block in range(count):
        code = bounded(base[block] + offset)
        scale = scale_value(code) * step
        inverse = np.float32(1) / scale
        error = np.float32(0)
        for i in range(GROUP_SIZE):
            x = magnitudes[i, block]
            y = x * inverse
            difference = round_e2m1(y if y < np.float32(6) else np.float32(6)) * scale - x
            error += difference * difference
        better = error < best[block]
        best[block] = error if better else best[block]
        codes[block] = code if better else codes[block]


@jit
def _pack_search(magnitudes, codes, step, count, words):  # type: ignore[no-untyped-def]
    """Write each block's 16 nibbles as two words; a value that becomes zero is +0, an all-zero block gets 0x20."""
    for block in range(count):
        inverse = np.float32(1) / (scale_value(codes[block]) * step)
        low, high = np.uint32(0), np.uint32(0)
        for i in range(8):
            y = magnitudes[i, block] * inverse
            value = e2m1_code(y if y < np.float32(6) else np.float32(6))
            low |= value << np.uint32(4 * i)
            y = magnitudes[i + 8, block] * inverse
            value = e2m1_code(y if y < np.float32(6) else np.float32(6))
            high |= value << np.uint32(4 * i)
        words[0, block] = low
        words[1, block] = high
        codes[block] = codes[block] if (low | high) else ZERO_CODE


@jit
def _minmax_scales(largest, kind, global_scale, count, codes, divisors):  # type: ignore[no-untyped-def]
    """Compute compressed-tensors' scale of each block: amax / 6 rounded in the weight's dtype, then to E4M3."""
    for block in range(count):
        sixth = largest[block] / np.float32(6)
        if kind == BF16:
            bits = bits_of(sixth)
            rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            sixth = float_of(np.uint32(rounded & np.uint32(0xFFFF0000)))
        value = min(global_scale * sixth, np.float32(E4M3_MAX))
        subnormal = (value * np.float32(512) + np.float32(2.0**23)) - np.float32(2.0**23)
        code = np.int32(subnormal) if value < np.float32(2.0**-6) else scale_code(value)
        code = code if code else ZERO_CODE
        codes[block] = code
        scale = np.float32(code) * np.float32(2.0**-9) if code < LOWEST else scale_value(code)
        divisors[block] = scale / global_scale


@jit
def _pack_minmax(magnitudes, signs, divisors, count, words):  # type: ignore[no-untyped-def]
    """Write each block's 16 nibbles as two words; a value that is not zero keeps its sign even if it becomes zero."""
    for block in range(count):
        divisor = divisors[block]
        low, high = np.uint32(0), np.uint32(0)
        for i in range(8):
            y = magnitudes[i, block] / divisor
            negative = (signs[0, block] >> np.uint32(4 * i)) & np.uint32(8 if y > np.float32(0) else 0)
            low |= (e2m1_code(y if y < np.float32(6) else np.float32(6)) | negative) << np.uint32(4 * i)
            y = magnitudes[i + 8, block] / divisor
            negative = (signs[1, block] >> np.uint32(4 * i)) & np.uint32(8 if y > np.float32(0) else 0)
            high |= (e2m1_code(y if y < np.float32(6) else np.float32(6)) | negative) << np.uint32(4 * i)
        words[0, block] = low
        words[1, block] = high


@jit
def _minmax_errors(magnitudes, divisors, count, errors):  # type: ignore[no-untyped-def]
    for block in range(count):
        error = np.float32(0)
        for i in range(GROUP_SIZE):
            x = magnitudes[i, block]
            y = x / divisors[block]
            difference = round_e2m1(y if y < np.float32(6) else np.float32(6)) * divisors[block] - x
            error += difference * difference
        errors[block] = error


@jit
def _store(words, signs, codes, count, packed, scales):  # type: ignore[no-untyped-def]
    """Write packed words and scale codes, giving each nibble that is not zero its sign."""
    for block in range(count):
        packed[2 * block] = words[0, block] | (signs[0, block] & nonzero_nibbles(words[0, block]))
        packed[2 * block + 1] = words[1, block] | (signs[1, block] & nonzero_nibbles(words[1, block]))
        scales[block] = codes[block]


@jit
def _norms(magnitudes, count, norms, nonzero):  # type: ignore[no-untyped-def]
    for block in range(count):
        total, found = np.float32(0), np.int32(0)
        for i in range(GROUP_SIZE):
            x = magnitudes[i, block]
            total += x * x
            found += np.int32(x > np.float32(0))
        norms[block] = total
        nonzero[block] = found


@jit
def tally(words, codes, errors, rounding, norms, nonzero, count, stats):  # type: ignore[no-untyped-def]
    """Add a chunk to `stats`: the seven numbers of TileStats, in float64."""
    for block in range(count):
        stats[0] += errors[block]
        stats[1] += norms[block]
        stats[2] += rounding[block]
        if norms[block] > np.float32(0):
            stats[3] = max(stats[3], np.float64(errors[block] / norms[block]))
        stored = count_bits(nonzero_nibbles(words[0, block])) + count_bits(nonzero_nibbles(words[1, block]))
        stats[4] += nonzero[block] - stored
        stats[5] += codes[block] == HIGHEST
        stats[6] += nonzero[block] == 0


@jit
def _search(source, kind, global_scale, packed, scales, stats):  # type: ignore[no-untyped-def]
    magnitudes = np.empty((GROUP_SIZE, CHUNK), np.float32)
    signs, words = np.empty((2, CHUNK), np.uint32), np.empty((2, CHUNK), np.uint32)
    base, codes, nonzero = np.empty(CHUNK, np.int32), np.empty(CHUNK, np.int32), np.empty(CHUNK, np.int32)
    largest, best = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    rounding, norms = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    step = np.float32(1) / global_scale
    for start in range(0, scales.size, CHUNK):
        count = min(CHUNK, scales.size - start)
        _load(source, kind, start, count, magnitudes, signs)
        _largest(magnitudes, count, largest)
        _start(largest, global_scale, count, base, best, codes)
        for offset in SEARCH_OFFSETS:
            _try_offset(magnitudes, base, np.int32(offset), step, count, best, codes)
            if offset == 0:
                rounding[:count] = best[:count]
        _pack_search(magnitudes, codes, step, count, words)
        _store(words, signs, codes, count, packed[2 * start :], scales[start:])
        _norms(magnitudes, count, norms, nonzero)
        tally(words, codes, best, rounding, norms, nonzero, count, stats)


@jit
def _minmax(source, kind, global_scale, packed, scales, stats):  # type: ignore[no-untyped-def]
    magnitudes = np.empty((GROUP_SIZE, CHUNK), np.float32)
    signs, words = np.empty((2, CHUNK), np.uint32), np.empty((2, CHUNK), np.uint32)
    codes, nonzero = np.empty(CHUNK, np.int32), np.empty(CHUNK, np.int32)
    largest, divisors = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    errors, norms = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for start in range(0, scales.size, CHUNK):
        count = min(CHUNK, scales.size - start)
        _load(source, kind, start, count, magnitudes, signs)
        _largest(magnitudes, count, largest)
        _minmax_scales(largest, kind, global_scale, count, codes, divisors)
        _pack_minmax(magnitudes, signs, divisors, count, words)
        for block in range(count):
            packed[2 * (start + block)] = words[0, block]
            packed[2 * (start + block) + 1] = words[1, block]
            scales[start + block] = codes[block]
        _minmax_errors(magnitudes, divisors, count, errors)
        _norms(magnitudes, count, norms, nonzero)
        tally(words, codes, errors, errors, norms, nonzero, count, stats)


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
        kind = KINDS[tile.dtype.name]
        source = tile.reshape(-1).view(np.uint32 if kind == F32 else np.uint16)
        run = _search if recipe.method == "search" else _minmax
        stats = np.zeros(STATISTICS)
        run(
            source, kind, np.float32(recipe.global_scale), packed.reshape(-1).view(np.uint32), scales.reshape(-1), stats
        )
        stats[3] = stats[3] ** 0.5
        return TileStats.from_array(tile.size, stats)
