"""Factors of channels from their second moments."""

from __future__ import annotations

import numpy as np

from mfptq.smoothing.factors import LIMIT, exponents


def test_factors_are_the_nearest_powers_of_two_of_fourth_roots_around_their_geometric_mean():
    moments = 2.0 ** np.array([0, 4, 8, 12, 16, 9])
    assert exponents(moments * 5, offset=0.0).tolist() == [-2, -1, 0, 1, 2, 0]


def test_norms_with_an_offset_only_grow():
    moments = 2.0 ** np.array([0, 4, 8, 12, 16])
    assert exponents(moments, offset=1.0).tolist() == [-4, -3, -2, -1, 0]


def test_silent_channels_stay_and_loud_ones_are_limited():
    moments = np.array([0.0, *[1.0] * 50, 1e30, 1e-30])
    found = exponents(moments, offset=0.0)
    assert found[0] == 0
    assert found[-2:].tolist() == [LIMIT, -LIMIT]
    assert exponents(np.zeros(4), offset=1.0).tolist() == [0, 0, 0, 0]
