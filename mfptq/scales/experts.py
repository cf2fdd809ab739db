"""Recognize input scales that no calibration gave, and fill those of routed experts that it never reached.

Called by `scales.assignment` for scales that are given, and by `planning.carried` for those of a source that is NVFP4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..names.engine import experts_parent
from ..names.fusion import FusedGroup
from .matching import names_error


def is_calibrated(global_scale: float) -> bool:
    """Return whether a number is a scale: 0, NaN, infinity and exactly 1 mark a module that calibration never reached."""
    return math.isfinite(global_scale) and global_scale not in (0.0, 1.0)


def fill_experts(origin: str, groups: Iterable[FusedGroup], chosen: dict[str, float]) -> int:
    """Give the experts' groups that have no scale their layer's smallest; return how many experts these are."""
    smallest: dict[str, float] = {}
    empty: dict[str, str] = {}
    for group in groups:
        # What a layer's experts share for one projection: their group's name without the expert's number.
        layer = f"{experts_parent(group.name)}.{group.name.rpartition('.')[2]}"
        if group.name in chosen:
            smallest[layer] = min(chosen[group.name], smallest.get(layer, math.inf))
        else:
            empty[group.name] = layer
    lost = [name for name, layer in empty.items() if layer not in smallest]
    if lost:
        words = "fused group of experts has no scale", "fused groups of experts have no scale"
        raise names_error(origin, lost, words, "no other expert of the layer has one either: calibrate with more text")
    chosen.update({name: smallest[layer] for name, layer in empty.items()})
    return len({name.rpartition(".")[0] for name in empty})
