"""Running sums over the tokens that reach an input: largest magnitude, second moments, 16x16 blocks of x x^T.

Products are taken in float32 over a few hundred tokens at a time and added up in float64, so that the sums do not depend
on how much text there is; the file holds their means in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ..calibration.file import InputStatistics, Level
from ..errors import ScaleError, quote
from ..nvfp4 import BLOCK_SIZE

CHUNK_ELEMENTS = 2**22

Float64Array = npt.NDArray[np.float64]


def sum_elements(columns: int, level: Level) -> int:
    """Return how many float64 numbers the sums of an input of K columns hold."""
    return {"amax": 0, "moments": columns, "hessian": BLOCK_SIZE * columns}[level]


@dataclass(slots=True)
class InputSums:
    """What was seen of one input so far; `total` is `[K]` for moments, `[K/16, 16, 16]` for Hessian blocks."""

    name: str
    columns: int
    level: Level
    tokens: int = 0
    amax: float = 0.0
    total: Float64Array = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.columns // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE) if self.level == "hessian" else (self.columns,)
        self.total = np.zeros(shape if self.level != "amax" else (0,))

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
                self.total += _products(chunk.float(), self.level).double().cpu().numpy()

    def statistics(self) -> InputStatistics:
        """Return the means, as the file holds them."""
        if self.level == "amax":
            return InputStatistics(self.amax, self.tokens)
        mean = (self.total / self.tokens).astype(np.float32)
        if self.level == "moments":
            return InputStatistics(self.amax, self.tokens, mean)
        return InputStatistics(self.amax, self.tokens, np.diagonal(mean, axis1=1, axis2=2).reshape(-1).copy(), mean)

    def restore(self, statistics: InputStatistics) -> None:
        """Go on from what a file holds."""
        assert statistics.tokens is not None
        self.amax, self.tokens = statistics.amax, statistics.tokens
        mean = statistics.hessian if self.level == "hessian" else statistics.second_moment
        if mean is not None:
            self.total = mean.astype(np.float64) * statistics.tokens


def _products(rows: torch.Tensor, level: Level) -> torch.Tensor:
    if level == "moments":
        return rows.square().sum(dim=0)
    blocks = rows.reshape(len(rows), -1, BLOCK_SIZE).transpose(0, 1)
    return torch.bmm(blocks.transpose(1, 2), blocks)
