"""Choose the method of a weight: the one asked for, or what its format and the calibration file allow.

Called by `plan` and, before there is one, by `weight_targets` for the layout of the shards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .formats import TargetFormat

if TYPE_CHECKING:
    from ..calibration.reading import Calibration


class WeightTarget(NamedTuple):
    """What a weight becomes: its format, and the method, which decides the dtype of some scales."""

    format: TargetFormat
    method: str


def weight_target(module: str, target: TargetFormat, method: str, calibration: Calibration | None) -> WeightTarget:
    """Return what a weight becomes, and by which method: the one asked for, or what format and calibration file allow."""
    if not target.takes_statistics:
        return WeightTarget(target, "minmax" if method == "minmax" else "search")
    return WeightTarget(target, method if calibration is None else calibration.method(module, method))
