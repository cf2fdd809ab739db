"""The CPU kernels of the calibrated methods: numba, vectorized across rows, which share their columns' statistics.

A chunk is one block of 16 columns in up to 64 rows, transposed, so that each instruction works on the same element of
several rows and every sum still runs in index order. Rows are padded to a multiple of 16 lanes: no scalar remainder.
"""

from __future__ import annotations

import math

import numpy as np

from ..nvfp4 import GROUP_SIZE, INPUT_SCALE_NUMERATOR, ByteArray
from . import STATISTICS, Recipe, Tile, TileStats
from .calibrated import CALIBRATED_OFFSETS, SWEEPS, Float32Array, Statistics, lower_factors
from .descent_cpu import descend, signed_e2m1
from .pieces import KINDS, base_code, bounded, exact_product_add, jit, round_e2m1, scale_value
from .rows import LANES, ONE, SIX, ZERO, gather, measure, pack, tally

PADDING = 16
_TOP = np.float32(INPUT_SCALE_NUMERATOR)
_OFFSETS = np.array(CALIBRATED_OFFSETS, np.int32)
_STEPS, _INVERSES, _ERRORS = (row * LANES for row in range(GROUP_SIZE, GROUP_SIZE + 3))  # rows after the values


@jit
def _bases(values, global_scale, lanes, base):  # type: ignore[no-untyped-def]
    """Write each lane's scale code rounded to nearest; return whether none is too small for its block."""
    fits = True
    for lane in range(lanes):
        largest = ZERO
        for i in range(GROUP_SIZE):
            largest = max(largest, abs(values[i * LANES + lane]))
        base[lane] = base_code(largest, global_scale)
        fits &= largest * global_scale <= _TOP
    return fits


@jit
def _scales(base, offset, step, lanes, scales, inverses):  # type: ignore[no-untyped-def]
    for lane in range(lanes):
        scale = scale_value(bounded(base[lane] + offset)) * step
        scales[lane] = scale
        inverses[lane] = ONE / scale


@jit
def _weighted(values, weights, scales, inverses, lanes, errors):  # type: ignore[no-untyped-def]
    """Write the weighted error of rounding each lane at its scale."""
    for lane in range(lanes):
        errors[lane] = ZERO
    for i in range(GROUP_SIZE):
        weight = weights[i]
        for lane in range(lanes):
            x = abs(values[i * LANES + lane])
            y = x * inverses[lane]
            difference = round_e2m1(y if y < SIX else SIX) * scales[lane] - x
            errors[lane] += (weight * difference) * difference


@jit
def _simply_weighted(floats, weights, lanes):  # type: ignore[no-untyped-def]
    """Do the same where no value exceeds 6 and value times scale is exact: in one array, so that it needs no checks."""
    for lane in range(lanes):
        scale, inverse, error = floats[_STEPS + lane], floats[_INVERSES + lane], ZERO
        for i in range(GROUP_SIZE):
            x = abs(floats[i * LANES + lane])
            difference = exact_product_add(round_e2m1(x * inverse), scale, -x)
            error += (weights[i] * difference) * difference
        floats[_ERRORS + lane] = error


@jit
def _differences(values, scales, inverses, lanes, differences):  # type: ignore[no-untyped-def]
    """Write what rounding each lane at its scale changes."""
    for i in range(GROUP_SIZE):
        for lane in range(lanes):
            x = values[i * LANES + lane]
            differences[i * LANES + lane] = signed_e2m1(x * inverses[lane]) * scales[lane] - x


@jit
def _quadratic(differences, lower, lanes, errors):  # type: ignore[no-untyped-def]  # noqa: C901, PLR0912
    """Write each lane's error; the loops over 4, 8, 12 and 16 entries only skip entries that are zero.

    They are written out because only loops of constant length are unrolled and then vectorized across lanes.
    """
    for lane in range(lanes):
        errors[lane] = ZERO
    for j in range(4):
        for lane in range(lanes):
            total = ZERO
            for i in range(4):
                total += lower[j, i] * differences[i * LANES + lane]
            errors[lane] += differences[j * LANES + lane] * total
    for j in range(4, 8):
        for lane in range(lanes):
            total = ZERO
            for i in range(8):
                total += lower[j, i] * differences[i * LANES + lane]
            errors[lane] += differences[j * LANES + lane] * total
    for j in range(8, 12):
        for lane in range(lanes):
            total = ZERO
            for i in range(12):
                total += lower[j, i] * differences[i * LANES + lane]
            errors[lane] += differences[j * LANES + lane] * total
    for j in range(12, 16):
        for lane in range(lanes):
            total = ZERO
            for i in range(16):
                total += lower[j, i] * differences[i * LANES + lane]
            errors[lane] += differences[j * LANES + lane] * total


@jit
def _keep_better(base, offset, errors, lanes, best, codes):  # type: ignore[no-untyped-def]
    for lane in range(lanes):
        better = errors[lane] < best[lane]
        best[lane] = errors[lane] if better else best[lane]
        codes[lane] = bounded(base[lane] + offset) if better else codes[lane]


@jit
def _round_all(values, inverses, lanes, rounded):  # type: ignore[no-untyped-def]
    """Write the signed E2M1 values at each lane's scale."""
    for i in range(GROUP_SIZE):
        for lane in range(lanes):
            rounded[i * LANES + lane] = signed_e2m1(values[i * LANES + lane] * inverses[lane])


@jit
def _rounding(values, scales, inverses, lanes, errors):  # type: ignore[no-untyped-def]
    """Write the squared error of rounding each lane at its scale."""
    for lane in range(lanes):
        errors[lane] = ZERO
    for i in range(GROUP_SIZE):
        for lane in range(lanes):
            x = abs(values[i * LANES + lane])
            y = x * inverses[lane]
            difference = round_e2m1(y if y < SIX else SIX) * scales[lane] - x
            errors[lane] += difference * difference


@jit
def _squares(values, rounded, scales, lanes, errors):  # type: ignore[no-untyped-def]
    for lane in range(lanes):
        errors[lane] = ZERO
    for i in range(GROUP_SIZE):
        for lane in range(lanes):
            difference = rounded[i * LANES + lane] * scales[lane] - values[i * LANES + lane]
            errors[lane] += difference * difference


@jit
def _choose(floats, base, step, statistics, lanes, work, exact):  # type: ignore[no-untyped-def]
    """Write each lane's scale code of least error; statistics: weights [16], or where empty, lower factors.

    `exact`: the global scale is a power of two, and rounding a block's scale takes no value above 6.
    """
    weights, lower = statistics
    codes, best, scratch = work
    values, errors = floats[:_STEPS], floats[_ERRORS:]
    steps, inverses = floats[_STEPS:_INVERSES], floats[_INVERSES:_ERRORS]
    codes[:] = base
    best[:] = np.float32(np.inf)
    for offset in _OFFSETS:
        _scales(base, offset, step, lanes, steps, inverses)
        if len(weights) and exact and offset >= 0:
            _simply_weighted(floats, weights, lanes)
        elif len(weights):
            _weighted(values, weights, steps, inverses, lanes, errors)
        else:
            _differences(values, steps, inverses, lanes, scratch)
            _quadratic(scratch, lower, lanes, errors)
        _keep_better(base, offset, errors, lanes, best, codes)


@jit
def _quantize(source, kind, global_scale, exact, statistics, sweeps, shape, out):  # type: ignore[no-untyped-def]
    """Quantize `shape` = (rows, columns) by (weights [K/16, 16], Hessians, their lower factors): one of them is empty.

    `exact`: the global scale is a power of two.
    """
    rows, columns = shape
    weights, hessian, lower = statistics
    packed, scales, stats = out
    floats, rounded = np.empty(_ERRORS + LANES, np.float32), np.empty(GROUP_SIZE * LANES, np.float32)
    values, errors = floats[:_STEPS], floats[_ERRORS:]
    steps, inverses = floats[_STEPS:_INVERSES], floats[_INVERSES:_ERRORS]
    scratch, words, base = np.empty_like(rounded), np.empty(2 * LANES, np.uint32), np.empty(LANES, np.int32)
    codes, nonzero, best = np.empty_like(base), np.empty_like(base), np.empty_like(errors)
    norms, rounding = np.empty_like(errors), np.empty_like(errors)
    step = ONE / global_scale
    blocks = columns // GROUP_SIZE
    for row in range(0, rows, LANES):
        count = min(LANES, rows - row)
        lanes = (count + PADDING - 1) // PADDING * PADDING
        for block in range(blocks):
            gather(source, kind, columns, block * GROUP_SIZE, row, count, lanes, values)
            simple = _bases(values, global_scale, lanes, base) and exact
            _scales(base, np.int32(0), step, lanes, steps, inverses)
            _rounding(values, steps, inverses, lanes, rounding)
            used = (weights[block : block + 1].reshape(-1), lower[min(block, len(lower) - 1)])
            _choose(floats, base, step, used, lanes, (codes, best, scratch), simple)
            _scales(codes, np.int32(0), step, lanes, steps, inverses)
            _round_all(values, inverses, lanes, rounded)
            if sweeps:
                descend(values, hessian[block], steps, inverses, lanes, rounded, scratch)
            _squares(values, rounded, steps, lanes, errors)
            pack(rounded, lanes, words, codes)
            measure(values, count, norms, nonzero)
            tally(words, codes, errors, rounding, norms, nonzero, count, stats)
            for lane in range(count):
                place = (row + lane) * blocks + block
                packed[2 * place] = words[lane]
                packed[2 * place + 1] = words[LANES + lane]
                scales[place] = codes[lane]


class CalibratedNumbaKernel:
    """Quantizes on the CPU; safe to use from several threads."""

    name = "numba"

    def quantize(
        self, tile: Tile, recipe: Recipe, statistics: Statistics, *, packed: ByteArray, scales: ByteArray
    ) -> TileStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""
        kind = KINDS[tile.dtype.char]
        source = tile.reshape(-1).view(np.uint32)
        stats = np.zeros(STATISTICS)
        out = (packed.reshape(-1).view(np.uint32), scales.reshape(-1), stats)
        sweeps = SWEEPS if recipe.method == "hessian+" else 0
        used = _as_arrays(statistics.values)
        exact = math.frexp(recipe.global_scale)[0] == 0.5
        _quantize(source, kind, np.float32(recipe.global_scale), exact, used, sweeps, tile.shape, out)
        stats[3] = stats[3] ** 0.5
        return TileStats.from_array(tile.size, stats)


def _as_arrays(values: Float32Array) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Return weights by block, Hessians, and their lower factors; what is not meant is empty, or one block of zeros."""
    if values.ndim == 1:
        empty = np.zeros((1, GROUP_SIZE, GROUP_SIZE), np.float32)
        return np.ascontiguousarray(values.reshape(-1, GROUP_SIZE)), empty, empty
    return np.empty((0, GROUP_SIZE), np.float32), np.ascontiguousarray(values), lower_factors(values)
