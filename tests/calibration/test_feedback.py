"""What feedback needs to know: targets and metrics as the whole Hessian gives them, however blocks are cut, whatever is dead."""

from __future__ import annotations

import numpy as np
import pytest

from mfptq.calibration import feedback
from mfptq.calibration.feedback import feedback_statistics
from mfptq.kernels import QuantizeArgs, load_kernel
from mfptq.kernels.calibrated import PreparedStatistics, feedback_size
from mfptq.nvfp4 import as_float32, dequantize, search_global_scale

from ..conftest import sampled
from .files import random_inputs, statistics_of

KEPT = 0.75


def dense(found) -> np.ndarray:
    """Return the Hessian that the statistics stand for, `[K, K]`, shrunk."""
    columns, low = found.second_moment.size, found.factors.astype(np.float64)
    result = KEPT * low.T @ low
    for block, start in enumerate(range(0, columns, 16)):
        own = found.hessian[block].astype(np.float64) * (KEPT + (1 - KEPT) * np.eye(16))
        result[start : start + 16, start : start + 16] = own
    return result


def split(records: np.ndarray, rank: int):
    """Return metrics `[n, 16, 16]`, feedback and factors `[n, r, 16]`, and the order of the blocks."""
    assert records.shape[1] == feedback_size(rank)
    metric, moves, factors, places = np.split(
        records.astype(np.float64), np.cumsum([256, 16 * rank, 16 * rank]), axis=1
    )
    shape = (len(records), rank, 16)
    return metric.reshape(-1, 16, 16), moves.reshape(shape), factors.reshape(shape), places[:, 0].astype(int)


@pytest.mark.parametrize("columns", [32, 160, 400])
def test_targets_and_metrics_are_those_of_the_whole_hessian(columns):
    """GPTQ by blocks: what later columns can make up for is left out of the metric (the Schur complement)."""
    found = statistics_of(random_inputs(columns), "factors")
    rank = len(found.factors)
    metrics, moves, factors, order = split(feedback_statistics(found.hessian, found.factors, KEPT), rank)
    traces = np.trace(found.hessian, axis1=1, axis2=2)
    assert sorted(order.tolist()) == list(range(columns // 16))
    assert (np.diff(traces[order]) <= 0).all()
    by_turn = np.concatenate([np.arange(16 * place, 16 * place + 16) for place in order])
    h = dense(found)[np.ix_(by_turn, by_turn)]
    differences = np.random.default_rng(0).standard_normal(columns)
    for turn in range(columns // 16):
        done = slice(0, 16 * turn)
        left = np.linalg.inv(h[16 * turn :, 16 * turn :])
        target = -left[:16] @ h[16 * turn :, done] @ differences[done]
        sums = np.einsum("bri,bi->r", factors[:turn], differences[done].reshape(-1, 16))
        np.testing.assert_allclose(moves[turn].T @ sums, target, atol=2e-6 * max(1.0, np.abs(target).max(initial=0)))
        metric = np.linalg.inv(left[:16, :16])
        np.testing.assert_allclose(metrics[turn], metric / np.trace(metric) * 16, atol=2e-6)


@pytest.mark.parametrize("rank", [5, 16, 64])
def test_sums_run_in_index_order(rank):
    """As on every processor: what numpy adds up in another order has other bits."""
    rng = np.random.default_rng(rank)
    left, right, row = rng.standard_normal((16, rank)), rng.standard_normal((rank, rank)), rng.standard_normal(rank)
    for other in (right, right.T, left.T):
        total = np.zeros((16, other.shape[1]))
        for k in range(rank):
            total = total + left[:, k, None] * other[None, k]
        assert np.array_equal(feedback._product(left, other), total)
    stack = np.stack([left, left[::-1]])
    found = feedback._product(stack, stack.transpose(0, 2, 1))
    assert np.array_equal(found[0], feedback._product(left, left.T))
    moved, along = np.zeros(rank), 0.0
    for k in range(rank):
        moved = moved + right[k] * row[k]
    for k in range(rank):
        along = along + moved[k] * row[k]
    assert np.array_equal(feedback._with_row(right, row), right - moved[:, None] * moved / (1.0 + along))


def test_slices_do_not_change_a_bit(monkeypatch):
    found = statistics_of(random_inputs(16 * 23), "factors")
    whole = feedback_statistics(found.hessian, found.factors, KEPT)
    for size in (1, 5, 64):
        monkeypatch.setattr(feedback, "SLICE_BLOCKS", size)
        assert np.array_equal(feedback_statistics(found.hessian, found.factors, KEPT), whole)


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1.0, 1e15])
def test_dead_and_extreme_inputs_give_finite_records(scale):
    x = random_inputs(96) * scale
    x[:, 16:32] = 0
    x[:, 40] = 0
    found = statistics_of(x, "factors")
    records = feedback_statistics(found.hessian, found.factors, 1 - 1e-9)
    assert np.isfinite(records).all()
    metrics, moves, factors, order = split(records, len(found.factors))
    dead = order.tolist().index(1)
    assert np.allclose(metrics[dead], np.eye(16))
    assert np.abs(moves[dead]).max() < 1e-12
    assert np.abs(factors[dead]).max() < 1e-12


def test_factors_that_say_more_than_the_blocks_are_survived():
    """A file may be off by what float32 rounds; a pivot that falls below zero must not become NaN."""
    found = statistics_of(random_inputs(64), "factors")
    assert np.isfinite(feedback_statistics(found.hessian, found.factors * np.float32(1.001), 1.0)).all()


def quantized(weight, method: str, values, scale: float):
    packed = np.empty((len(weight), weight.shape[1] // 2), np.uint8)
    codes = np.empty((len(weight), weight.shape[1] // 16), np.uint8)
    load_kernel().quantize(weight, QuantizeArgs(method, scale, PreparedStatistics(values)), packed, codes)
    return dequantize(packed, codes, scale) - as_float32(weight)


@pytest.mark.parametrize("seed", sampled([0], [1, 2]))
def test_outputs_are_better_than_without_feedback(seed):
    x = random_inputs(256, 4000, seed) @ np.linalg.qr(np.random.default_rng(seed).standard_normal((256, 256)))[0]
    x[:, :64] += random_inputs(64, 4000, seed + 9)
    found = statistics_of(x, "factors")
    weight = np.random.default_rng(seed).standard_normal((64, 256)).astype(np.float32)
    scale = search_global_scale(float(np.abs(weight).max()))
    errors = [
        np.square(quantized(weight, method, values, scale) @ x.T).sum()
        for method, values in (
            ("hessian+", found.hessian),
            ("gptq", feedback_statistics(found.hessian, found.factors, 1 - 1e-6)),
        )
    ]
    assert errors[1] < 0.9 * errors[0]
