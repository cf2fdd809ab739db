"""Statistics of inputs whose channels are divided, against those of the divided activations themselves."""

from __future__ import annotations

import numpy as np
import pytest

from mfptq.calibration.smoothed import PEAK, largest, smoothed

from .files import random_inputs, statistics_of


def test_moments_and_blocks_follow_exactly():
    x, exponents = random_inputs(64), np.random.default_rng(2).integers(-8, 9, 64).astype(np.int8)
    found, expected = smoothed(statistics_of(x), exponents), statistics_of(x / 2.0**exponents)
    assert (found.second_moment == expected.second_moment).all()
    assert (found.hessian == expected.hessian).all()
    assert found.tokens == expected.tokens
    assert expected.amax <= found.amax <= 32 * expected.amax


def test_undivided_inputs_keep_their_largest_value():
    statistics = statistics_of(random_inputs(64))
    assert largest(statistics, np.zeros(64, np.int8)) == statistics.amax


@pytest.mark.parametrize(("tokens", "peak"), [(100, 10), (4096, PEAK), (10**5, PEAK)])
def test_a_quiet_channel_is_not_taken_to_be_as_loud_as_the_loudest(tokens, peak):
    x = np.ones((tokens, 16))
    x[0, 0] = 1000
    exponents = np.full(16, -3, np.int8)
    exponents[0] = 4
    assert largest(statistics_of(x, "moments"), exponents) == max(1000 / 16, peak * 8)
