"""The calibrated kernels: the same bytes everywhere, the rule as written, and never worse than search by their own measure."""

from __future__ import annotations

import numpy as np
import pytest

from mfptq.calibration.feedback import feedback_statistics
from mfptq.calibration.methods import importance, local_hessian
from mfptq.kernels import QuantizeArgs, load_kernel
from mfptq.kernels.calibrated import (
    CALIBRATED_METHODS,
    CALIBRATED_OFFSETS,
    FEEDBACK,
    LOCAL_METHODS,
    SWEEPS,
    PreparedStatistics,
)
from mfptq.kernels.calibrated_torch import CalibratedTorchKernel
from mfptq.kernels.cpu import CpuKernel
from mfptq.nvfp4 import E2M1_VALUES, E4M3_VALUES, as_float32, dequantize, e2m1_encode, e4m3_encode, search_global_scale

from ..calibration.files import factors_of
from ..conftest import sampled

METHODS = CALIBRATED_METHODS


def weights(dtype: str, rows: int, columns: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)) * rng.lognormal(0, 1, (1, columns)) * 0.02
    values[rng.random(values.shape) < 0.002] *= 12
    values[0, :16] = 0
    values[-1, -16:] = -0.0
    values[-1, :8:2] = 0  # to which descent may give a value
    if rows > 3:
        values[2, :16] = 1e-38
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def inputs(columns: int, tokens: int = 300, seed: int = 0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns)) * (rng.random((columns, columns)) < 0.1) + np.eye(columns)
    x = rng.standard_normal((tokens, columns)) @ mixing * rng.lognormal(0, 1, columns) + rng.standard_normal(columns)
    x[:, 16:32] = 0 if columns > 32 else x[:, 16:32]
    return x


def hessian_of(x):
    blocks = x.reshape(len(x), -1, 16)
    return np.einsum("tbi,tbj->bij", blocks, blocks) / len(x)


def statistics(method: str, x) -> PreparedStatistics:
    blocks = hessian_of(x).astype(np.float32)
    moment = np.diagonal(blocks, axis1=1, axis2=2).reshape(-1)
    if method == FEEDBACK:
        return PreparedStatistics(feedback_statistics(blocks, factors_of(x), 0.9))
    return PreparedStatistics(importance(moment) if method == "weighted" else local_hessian(blocks, 10**15))


def quantize(kernel, weight, method: str, scale: float, found: PreparedStatistics | None):
    packed = np.full((len(weight), weight.shape[1] // 2), 0xEE, np.uint8)
    codes = np.full((len(weight), weight.shape[1] // 16), 0xEE, np.uint8)
    return packed, codes, kernel.quantize(weight, QuantizeArgs(method, scale, found), packed, codes)


def scale_of(weight) -> float:
    return search_global_scale(float(np.abs(as_float32(weight)).max()))


FACTORS = {"BF16": 1, "F16": 1.37, "F32": 8}  # a global scale that is no power of two, or too large for some blocks


SHAPES = {(1, 16): "BF16", (5, 48): "F16", (64, 64): "F32", (97, 160): "BF16"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("shape", "dtype", "factor"),
    sampled(
        [(shape, dtype, FACTORS[dtype]) for shape, dtype in SHAPES.items()],
        [
            (shape, dtype, factor)
            for shape, own in SHAPES.items()
            for dtype in FACTORS
            for factor in FACTORS.values()
            if (dtype, factor) != (own, FACTORS[own])
        ],
    ),
)
def test_compiled_and_torch_kernels_agree_to_the_byte(method, dtype, shape, factor):
    weight = weights(dtype, *shape)
    found, scale = statistics(method, inputs(shape[1])), float(np.float32(factor * scale_of(weight)))
    ours = quantize(CpuKernel(), weight, method, scale, found)
    theirs = quantize(CalibratedTorchKernel(), weight, method, scale, found)
    assert np.array_equal(ours[0], theirs[0])
    assert np.array_equal(ours[1], theirs[1])
    for name in ("squared_error", "squared_weight", "rounding_squared_error", "worst_block"):
        assert getattr(ours[2], name) == pytest.approx(getattr(theirs[2], name), rel=1e-6), name
    for name in ("weights", "zeroed", "saturated_blocks", "zero_blocks"):
        assert getattr(ours[2], name) == getattr(theirs[2], name), name


def reference(weight, method: str, scale: float, values):
    """The rule, one block at a time, as the documentation words it; float32 with sums in index order."""
    w = as_float32(weight)
    result = np.zeros_like(w)
    for r in range(w.shape[0]):
        if method == FEEDBACK:
            result[r] = reference_row(w[r], scale, values)
            continue
        for b in range(w.shape[1] // 16):
            known = values[16 * b : 16 * b + 16] if method == "weighted" else values[b]
            result[r, 16 * b : 16 * b + 16] = reference_block(w[r, 16 * b : 16 * b + 16], method, scale, known)
    return result


def reference_row(w, scale: float, records):
    """Blocks in the order of their records, each moved by what the differences before it ask for."""
    result, rank = np.zeros_like(w), (records.shape[1] - 257) // 32
    sums = np.zeros(rank, np.float32)
    for record in records:
        metric, moves, factors, place = np.split(record, np.cumsum([256, 16 * rank, 16 * rank]))
        x = w[16 * int(place[0]) :][:16]
        target = x.copy()
        for k in range(rank):
            target += moves[16 * k : 16 * k + 16] * sums[k]
        found = reference_block(target, "hessian+", scale, metric.reshape(16, 16))
        for k in range(rank):
            for i in range(16):
                sums[k] += factors[16 * k + i] * (found[i] - x[i])
        result[16 * int(place[0]) :][:16] = found
    return result


def reference_block(x, method: str, scale: float, known):
    f = np.float32
    base = int(np.clip(e4m3_encode(np.minimum(np.abs(x).max()[None] / f(6) * f(scale), f(448)))[0], 8, 126))
    best, choice = np.inf, None
    for offset in CALIBRATED_OFFSETS:
        s = E4M3_VALUES[int(np.clip(base + offset, 8, 126))] / f(scale)
        q = np.where(x < 0, f(-1), f(1)) * E2M1_VALUES[e2m1_encode(np.abs(x) * (f(1) / s))]
        d = q * s - x
        error = f(0)
        for j in range(16):
            if method == "weighted":
                error += known[j] * d[j] * d[j]
            else:
                inner = f(0)
                for i in range(j):
                    inner += f(2) * known[j, i] * d[i]
                error += d[j] * (inner + known[j, j] * d[j])
        if error < best:
            best, choice = error, (s, q)
    s, q = choice
    return (reference_descent(x, q, s, known) if method == "hessian+" else q) * s


def reference_descent(x, q, s, h):
    f = np.float32
    g = np.zeros(16, f)
    for i in range(16):
        g += h[:, i] * (q[i] * s - x[i])
    for _ in range(SWEEPS):
        moved = False
        for i in range(16):
            target = (q[i] * s - g[i] * (f(1) / h[i, i])) * (f(1) / s)
            new = (f(-1) if target < 0 else f(1)) * E2M1_VALUES[e2m1_encode(np.abs(target)[None])[0]]
            change = new * s - q[i] * s
            if change * (g[i] + g[i] + h[i, i] * change) < 0:
                q[i], moved = new, True
                g += h[:, i] * change
        if not moved:
            break
    return q


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_of_the_rule(method):
    weight = weights("F32", 20, 64)
    found, scale = statistics(method, inputs(64)), scale_of(weight)
    packed, codes, _ = quantize(CpuKernel(), weight, method, scale, found)
    assert np.array_equal(dequantize(packed, codes, scale), reference(weight, method, scale, found.values))


def output_errors(weight, scale, packed, codes, h):
    """Return, for each block, the error of the layer's output that its differences alone make, in float64."""
    d = (dequantize(packed, codes, scale).astype(np.float64) - as_float32(weight)).reshape(len(weight), -1, 16)
    return np.einsum("rbi,bij,rbj->rb", d, h, d)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", LOCAL_METHODS)  # feedback makes a block worse where that helps others
def test_no_block_is_worse_than_search_by_the_measure_of_the_method(method, seed):
    weight = weights("BF16", 64, 96, seed)
    h = hessian_of(inputs(96, seed=seed))
    if method == "weighted":
        h = np.einsum("bii->bi", h)[:, :, None] * np.eye(16)
    scale = scale_of(weight)
    plain = quantize(load_kernel(), weight, "search", scale, None)
    ours = quantize(CpuKernel(), weight, method, scale, statistics(method, inputs(96, seed=seed)))
    before, after = (output_errors(weight, scale, *result[:2], h) for result in (plain, ours))
    assert after.sum() < 0.97 * before.sum()
    assert (after <= before * (1 + 1e-3) + 1e-12 * before.max()).all()


def test_descent_lowers_the_error_of_the_hessian_alone():
    weight, x = weights("BF16", 64, 96), inputs(96)
    scale, h = scale_of(weight), hessian_of(x)
    errors = {}
    for method in ("hessian", "hessian+"):
        packed, codes, _ = quantize(CpuKernel(), weight, method, scale, statistics(method, x))
        errors[method] = output_errors(weight, scale, packed, codes, h)
    assert (errors["hessian+"] <= errors["hessian"] * (1 + 1e-3) + 1e-12).all()
    assert errors["hessian+"].sum() < 0.95 * errors["hessian"].sum()


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_parts_of_rows_give_the_bytes_of_the_whole(method):
    weight = weights("BF16", 70, 128)
    found, scale, kernel = statistics(method, inputs(128)), scale_of(weight), CpuKernel()
    packed, codes, _ = quantize(kernel, weight, method, scale, found)
    parts = [(slice(0, 3), 0, 128), (slice(60, 70), 0, 128)]
    parts += [(slice(5, 6), 32, 80)] if method in LOCAL_METHODS else []
    for rows, start, columns in parts:
        part = np.ascontiguousarray(weight[rows, start : start + columns])
        some = quantize(kernel, part, method, scale, found.part(start, columns))
        assert np.array_equal(some[0], packed[rows, start // 2 : (start + columns) // 2])
        assert np.array_equal(some[1], codes[rows, start // 16 : (start + columns) // 16])


@pytest.mark.parametrize("kernel", [CpuKernel, CalibratedTorchKernel])
@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_positive_and_dead_blocks_have_the_scale_of_zero(method, kernel):
    weight = weights("F32", 8, 64)
    packed, codes, stats = quantize(kernel(), weight, method, scale_of(weight), statistics(method, inputs(64)))
    assert 8 not in (packed & 15)
    assert 8 not in (packed >> 4)
    assert stats.zero_blocks == 2
    assert codes.min() >= 8
    if method in LOCAL_METHODS:  # feedback may give a value to what was zero, to make up for other errors of its row
        assert codes[0, 0] == codes[-1, -1] == 0x20
        assert (packed[0, :8] == 0).all()
    weight[3] = 0
    packed, codes, _ = quantize(kernel(), weight, method, scale_of(weight), statistics(method, inputs(64)))
    assert (codes[3] == 0x20).all()
    assert not packed[3].any()


def test_a_dead_channel_is_quantized_as_by_search():
    weight = weights("F32", 8, 64)
    scale = scale_of(weight)
    plain = quantize(load_kernel(), weight, "search", scale, None)
    x = inputs(64)
    x[:, :] = 0
    for method in METHODS:
        packed, codes, _ = quantize(CpuKernel(), weight, method, scale, statistics(method, x))
        same = codes == plain[1]
        assert same.mean() > 0.9  # four more offsets may win
        assert output_errors(weight, scale, packed, codes, np.tile(np.eye(16), (4, 1, 1))).sum() <= (
            output_errors(weight, scale, plain[0], plain[1], np.tile(np.eye(16), (4, 1, 1))).sum() * (1 + 1e-6)
        )
