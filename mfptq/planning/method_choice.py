"""Choose the method of a weight: the one asked for, or what its format and the calibration file allow.

Called by `plan` and, before there is one, by `weight_targets` for the layout of the shards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.header import tensor_bytes
from ..checkpoint.weights import Weight
from .formats import OutputTensor, TargetFormat

if TYPE_CHECKING:
    from ..calibration.reading import Calibration


class WeightTarget(NamedTuple):
    """What a weight becomes: its format, and the method, which decides the dtype of some scales."""

    format: TargetFormat
    method: str


class WeightRun(NamedTuple):
    """Weights that follow each other in one source tensor and become the same: all experts of a stack, for the most part."""

    target: WeightTarget
    weights: tuple[Weight, ...]

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """What each of the weights becomes."""
        return tuple(self.target.format.tensors(self.weights[0], self.target.method))

    @property
    def weight_bytes(self) -> int:
        """Size of all tensors that one of the weights becomes, in bytes."""
        return sum(tensor_bytes(each.dtype, each.shape) or 0 for each in self.tensors)


def weight_target(module: str, target: TargetFormat, method: str, calibration: Calibration | None) -> WeightTarget:
    """Return what a weight becomes, and by which method: the one asked for, or what format and calibration file allow."""
    if not target.takes_statistics:
        return WeightTarget(target, "minmax" if method == "minmax" else "search")
    return WeightTarget(target, method if calibration is None else calibration.method(module, method))
