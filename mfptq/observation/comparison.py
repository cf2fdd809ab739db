"""Compare what two models give for the same text: sums over the positions of a window.

Called by `evaluate`. What becomes of the sums is in `output.estimates`.
"""

from __future__ import annotations

import torch

from ..output.estimates import WindowSums
from .texts import TokenIds

CHUNK_ELEMENTS = 2**24  # log-probabilities that are in memory at once, for each model


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
