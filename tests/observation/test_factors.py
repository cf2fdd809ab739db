"""Factors of running text: never more than all of it, nearly its largest directions, the same however a run is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mfptq.calibration.file import factor_rank
from mfptq.observation.factors import FactorSums

COLUMNS = 256


def samples(count: int, tokens: int = 120, columns: int = COLUMNS) -> list[torch.Tensor]:
    """Return activations whose directions have very different sizes, and one channel far larger than all others."""
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    spread = torch.logspace(1, -2, columns)
    found = [torch.randn(tokens, columns, generator=generator) * spread @ mixing for _ in range(count)]
    for each in found:
        each[:, 3] += 300
    return found


def square(parts: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.cat(parts).double()
    return rows.T @ rows


def after(parts: list[torch.Tensor], columns: int = COLUMNS) -> FactorSums:
    sums = FactorSums(columns)
    for part in parts:
        sums.add(part)
    return sums


def test_factors_are_nearly_the_largest_directions() -> None:
    parts = samples(12)
    factors, whole = torch.from_numpy(after(parts).mean(1)).double(), square(parts)
    best = torch.linalg.eigvalsh(whole)[-factor_rank(COLUMNS) :].sum()
    left = whole.trace() - factors.square().sum()
    assert left < 1.3 * (whole.trace() - best)


@pytest.mark.parametrize("columns", [16, 48, COLUMNS])
@pytest.mark.parametrize("tokens", [1, 5, 120])
def test_what_factors_leave_is_never_negative(columns: int, tokens: int) -> None:
    parts = samples(6, tokens, columns)
    factors, whole = torch.from_numpy(after(parts, columns).mean(1)).double(), square(parts)
    scale = whole.diagonal().sqrt()
    left = (whole - factors.T @ factors) / scale[:, None] / scale
    assert torch.linalg.eigvalsh(left)[0] > -1e-5


def test_little_rounding_adds_up() -> None:
    """Float32 is carried from sample to sample: a bias would grow with text."""
    parts = samples(400, 70, 64)
    factors, whole = torch.from_numpy(after(parts, 64).mean(1)).double(), square(parts)
    assert float(factors.square().sum() / whole.trace()) == pytest.approx(1, abs=1e-5)


def test_text_that_says_nothing_leaves_nothing() -> None:
    sums = after([torch.zeros(20, 32)], 32)
    assert not sums.mean(20).any()
    parts = samples(3, 40, 32)
    for part in parts:
        sums.add(part)
    assert float(np.square(sums.mean(1)).sum() / square(parts).trace()) == pytest.approx(1, abs=1e-5)


def test_the_same_text_gives_the_same_bits() -> None:
    assert np.array_equal(after(samples(3)).mean(360), after(samples(3)).mean(360))
