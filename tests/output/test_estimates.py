"""Standard errors against repeated draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mfptq.output.estimates import Estimate, exponential, ratio


def test_a_ratio_weighs_windows_by_their_tokens() -> None:
    assert ratio([6.0, 1.0], [3, 1]).value == 7 / 4
    assert ratio([6.0], [3]) == Estimate(2.0, None)
    assert ratio([2.0, 4.0, 6.0], [1, 2, 3]).standard_error == 0.0
    totals = [1.0, 2.0, 4.0, 5.0]
    found = ratio(totals, [1, 1, 1, 1])
    assert found.standard_error == pytest.approx(np.std(totals, ddof=1) / math.sqrt(4))


def test_the_standard_error_is_the_spread_of_repeated_estimates() -> None:
    rng = np.random.default_rng(4)
    found = []
    for _ in range(2000):
        counts = rng.integers(20, 60, 30)
        totals = counts * (1 + 0.3 * rng.standard_normal(30)) + rng.standard_normal(30)
        found.append(ratio(totals.tolist(), counts.tolist()))
    spread = float(np.std([each.value for each in found]))
    assert float(np.mean([each.standard_error for each in found])) == pytest.approx(spread, rel=0.1)


def test_an_exponential_takes_its_error_along() -> None:
    assert exponential(Estimate(2.0, 0.01)) == Estimate(math.exp(2), math.exp(2) * 0.01)
    assert exponential(Estimate(1e4, None)).value < math.inf
