"""Hold what comparing a layer of an output with its source has shown: errors of its values, its blocks, and what it computes.

Filled by `comparison.measuring`, shown by `reporting`. Numbers only; nothing is read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

STEP: Final = 0.01  # the width of a bin of block errors; the last one holds all that are larger
BINS: Final = 31


@dataclass(slots=True)
class Measured:
    """Sums over a layer's weights. `blocks` counts blocks of 16 values by relative error, in bins of STEP.

    `output_error` and `output_norm` are squares that a calibration file's statistics of the inputs give for the error of the
    layer's output and for the output itself; both are 0 where nothing is known of the inputs.
    """

    squared_error: float = 0.0
    squared_weight: float = 0.0
    blocks: list[int] = field(default_factory=lambda: [0] * BINS)
    output_error: float = 0.0
    output_norm: float = 0.0

    def add(self, other: Measured) -> None:
        """Take in what was found of other weights."""
        self.squared_error += other.squared_error
        self.squared_weight += other.squared_weight
        self.blocks = [one + another for one, another in zip(self.blocks, other.blocks, strict=True)]
        self.output_error += other.output_error
        self.output_norm += other.output_norm

    @property
    def relative_error(self) -> float:
        """Norm of the difference over norm of the weights."""
        return _ratio(self.squared_error, self.squared_weight)

    @property
    def relative_output_error(self) -> float | None:
        """The same of the layer's output; None where nothing is known of its inputs."""
        return _ratio(self.output_error, self.output_norm) if self.output_norm else None


def _ratio(error: float, norm: float) -> float:
    return float((error / norm) ** 0.5) if norm else 0.0


def total(measured: Sequence[Measured]) -> Measured:
    """Return the sums over several layers."""
    result = Measured()
    for each in measured:
        result.add(each)
    return result


def quantile(blocks: Sequence[int], share: float) -> float:
    """Return the error, the upper end of a bin, that this share of the blocks does not exceed."""
    wanted, seen = share * sum(blocks), 0
    for number, count in enumerate(blocks, start=1):
        seen += count
        if seen >= wanted:
            return number * STEP
    return len(blocks) * STEP
