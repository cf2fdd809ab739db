"""Make figures with standard errors of the sums of an evaluation's windows.

Called by `observation`, and by `reporting` for two outputs that were evaluated on the same text. Windows of text are the
units of every standard error: tokens of one window depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tokens, and its standard error over windows of text; None for a single window."""

    value: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class WindowSums:
    """Sums over the judged positions of one window: those whose next token is known."""

    positions: int
    source_loss: float
    loss: float
    divergence: float
    agreed: int


def ratio(totals: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Return the mean of all windows together, and its standard error, from each window's total and count.

    The estimate is a ratio of sums, its error that of a ratio: windows may differ in length.
    """
    number, tokens = len(totals), sum(counts)
    mean = math.fsum(totals) / tokens
    if number < 2:
        return Estimate(mean, None)
    residuals = math.fsum((total - mean * count) ** 2 for total, count in zip(totals, counts, strict=True))
    return Estimate(mean, math.sqrt(residuals * number / (number - 1)) / tokens)


def exponential(estimate: Estimate) -> Estimate:
    """Return the exponential of a mean, as perplexity is of a loss, with its standard error to first order."""
    value = math.exp(min(estimate.value, 700.0))
    return Estimate(value, None if estimate.standard_error is None else value * estimate.standard_error)
