"""Error statistics of quantized weights. Every kernel returns them; runs add them up for the report.

Nothing here computes an error: the arithmetic is in `blocks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..storage.checksum import MODULUS

ERROR_FIELDS = 7  # of ErrorStats, as kernels write them: all but `weights` and `checksum`
WORST = 3  # among them: the one that is no sum


@dataclass(slots=True)
class ErrorStats:
    """What quantization did to some weights; sums add up over tiles, `worst_block` is a relative error.

    `checksum` is that of the values before, as `storage.checksum` makes it; kernels leave it 0.
    """

    weights: int = 0
    squared_error: float = 0.0
    squared_weight: float = 0.0
    rounding_squared_error: float = 0.0
    worst_block: float = 0.0
    zeroed: int = 0
    saturated_blocks: int = 0
    zero_blocks: int = 0
    checksum: int = 0

    def add(self, other: ErrorStats) -> None:
        """Take in the statistics of other weights."""
        self.weights += other.weights
        self.squared_error += other.squared_error
        self.squared_weight += other.squared_weight
        self.rounding_squared_error += other.rounding_squared_error
        self.worst_block = max(self.worst_block, other.worst_block)
        self.zeroed += other.zeroed
        self.saturated_blocks += other.saturated_blocks
        self.zero_blocks += other.zero_blocks
        self.checksum = (self.checksum + other.checksum) % MODULUS

    @property
    def relative_error(self) -> float:
        """Relative Frobenius error: norm of the difference over norm of the weights."""
        return float((self.squared_error / self.squared_weight) ** 0.5) if self.squared_weight else 0.0

    @classmethod
    def from_array(cls, weights: int, values: npt.NDArray[np.float64]) -> ErrorStats:
        """Return statistics from a kernel's seven numbers, in the order of the fields after `weights`."""
        error, weight, rounding, worst, zeroed, saturated, zero = values.tolist()
        return cls(weights, error, weight, rounding, worst, int(zeroed), int(saturated), int(zero))

    @classmethod
    def together(cls, weights: int, rows: npt.NDArray[np.float64]) -> ErrorStats:
        """Return the statistics of several weights, `[n, 7]`, as one."""
        values = rows.sum(axis=0)
        values[WORST] = rows[:, WORST].max()
        return cls.from_array(weights, values)

    def as_array(self) -> npt.NDArray[np.float64]:
        """Return what `from_array` takes."""
        return np.array([getattr(self, name) for name in self.__slots__[1 : 1 + ERROR_FIELDS]], np.float64)
