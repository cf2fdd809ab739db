"""Compare what two models give for the same text, and say how sure the figures are.

Called by `evaluate`. Windows of text are the units of every standard error: tokens of one window depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .texts import TokenIds

CHUNK_ELEMENTS = 2**24  # log-probabilities that are in memory at once, for each model


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


def compare_logits(source: torch.Tensor, output: torch.Tensor, ids: TokenIds) -> WindowSums:
    """Return the sums for logits `[L, V]` of both models on the same `L` tokens.

    `divergence` is that of the output's distribution from the source's, KL(source || output), in nats; `loss` the negative
    log-probability of the next token. Logarithms are taken in float32, sums in float64.
    """
    count = len(ids) - 1
    following = torch.from_numpy(ids[1:]).to(source.device)[:, None]
    sums = torch.zeros(4, dtype=torch.float64)
    step = max(1, CHUNK_ELEMENTS // source.shape[-1])
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        exact, found = (torch.log_softmax(logits[part].float(), dim=-1) for logits in (source, output))
        sums[0] -= exact.gather(1, following[part]).sum(dtype=torch.float64).cpu()
        sums[1] -= found.gather(1, following[part]).sum(dtype=torch.float64).cpu()
        sums[2] += (exact.exp() * (exact - found)).sum(dtype=torch.float64).cpu()
        sums[3] += (exact.argmax(dim=-1) == found.argmax(dim=-1)).sum().cpu()
    return WindowSums(count, float(sums[0]), float(sums[1]), float(sums[2]), int(sums[3]))


def hidden_error(source: torch.Tensor, output: torch.Tensor) -> float:
    """Return the sum over tokens of `|output - source| / |source|` for hidden states `[..., L, H]`."""
    exact = source.float()
    norms = exact.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((output.float() - exact).norm(dim=-1) / norms).sum(dtype=torch.float64))


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
