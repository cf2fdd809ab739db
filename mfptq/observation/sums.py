"""Sum up the tokens that reach an input: largest magnitude, second moments, 16x16 blocks of x x^T, factors.

Products are taken in float32 over a few hundred tokens at a time and added up in float64, so that the sums do not depend
on how much text there is; the file holds their means in float32. Called by `recording`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ..calibration.file import InputStatistics, Level, factor_rank, includes
from ..errors import ScaleError, quote
from ..nvfp4 import BLOCK_SIZE
from .factors import FactorSums

CHUNK_ELEMENTS = 2**22

Float64Array = npt.NDArray[np.float64]


def sum_elements(columns: int, level: Level) -> int:
    """Return how many numbers of float64, or two of float32, the sums of an input of K columns hold."""
    blocks = BLOCK_SIZE * columns
    factors = factor_rank(columns) * columns // 2
    return {"amax": 0, "moments": columns, "hessian": blocks, "factors": blocks + factors}[level]


@dataclass(slots=True)
class InputSums:
    """What was seen of one input so far; `total` is `[K]` for moments, `[K/16, 16, 16]` for Hessian blocks.

    `factors` is None below that level.
    """

    name: str
    columns: int
    level: Level
    tokens: int = 0
    amax: float = 0.0
    total: Float64Array = field(init=False)
    factors: FactorSums | None = field(init=False)

    def __post_init__(self) -> None:
        blocks = (self.columns // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)
        shape = blocks if includes(self.level, "hessian") else (self.columns,)
        self.total = np.zeros(shape if self.level != "amax" else (0,))
        self.factors = FactorSums(self.columns) if self.level == "factors" else None

    def add(self, inputs: torch.Tensor) -> None:
        """Take in activations `[..., K]`, each row a token; raises ScaleError if any is NaN or infinite."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if not len(rows):
            return
        low, high = rows.aminmax()
        amax = max(-float(low), float(high))
        if not math.isfinite(amax):
            raise ScaleError(f"an activation that reaches {quote(self.name)} is not finite: no statistics can be taken")
        self.amax = max(self.amax, amax)
        self.tokens += len(rows)
        if self.level != "amax":
            for chunk in torch.split(rows, max(1, CHUNK_ELEMENTS // self.columns)):
                values = chunk.float()
                self.total += _products(values, self.level).double().cpu().numpy()
                if self.factors is not None:
                    self.factors.add(values)

    def statistics(self) -> InputStatistics:
        """Return the means, as the file holds them."""
        if self.level == "amax":
            return InputStatistics(self.amax, self.tokens)
        mean = (self.total / self.tokens).astype(np.float32)
        if self.level == "moments":
            return InputStatistics(self.amax, self.tokens, mean)
        moment = np.diagonal(mean, axis1=1, axis2=2).reshape(-1).copy()
        factors = self.factors.mean(self.tokens) if self.factors is not None else None
        return InputStatistics(self.amax, self.tokens, moment, mean, factors)

    def restore(self, statistics: InputStatistics) -> None:
        """Go on from what a file holds."""
        assert statistics.tokens is not None
        self.amax, self.tokens = statistics.amax, statistics.tokens
        mean = statistics.hessian if includes(self.level, "hessian") else statistics.second_moment
        if mean is not None:
            self.total = mean.astype(np.float64) * statistics.tokens
        if self.factors is not None and statistics.factors is not None:
            self.factors.restore(statistics.factors, statistics.tokens)


def _products(rows: torch.Tensor, level: Level) -> torch.Tensor:
    if level == "moments":
        return rows.square().sum(dim=0)
    blocks = rows.reshape(len(rows), -1, BLOCK_SIZE).transpose(0, 1)
    return torch.bmm(blocks.transpose(1, 2), blocks)
