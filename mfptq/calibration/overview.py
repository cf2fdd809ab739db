"""Sum up what a calibration file holds: how much text reached each input, and which inputs stand out.

Called by `mfptq calibration show`, which prints it. Reads the file input by input.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .file import InputInfo
from .reading import Calibration

FEW_TOKENS = 100


@dataclass(frozen=True, slots=True)
class InputOverview:
    """One input: `ratio` is amax over the root of the mean square; both None where only the range is known."""

    name: str
    columns: int
    modules: int
    tokens: int | None
    amax: float
    ratio: float | None


@dataclass(frozen=True, slots=True)
class ExpertsOverview:
    """A layer's experts: how many of them its router gave no token, how many fewer than 100, and the least and most."""

    name: str
    experts: int
    without: int
    few: int
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Overview:
    """A file's description, its inputs with the largest ratio first, its experts with the least tokens first, and its
    sensitivities, the largest first.
    """

    description: dict[str, Any]
    columns: int
    modules: int
    inputs: tuple[InputOverview, ...]
    experts: tuple[ExpertsOverview, ...]
    sensitivities: dict[str, float]


def overview(calibration: Calibration) -> Overview:
    """Return what a calibration file holds; reads it input by input."""
    inputs = [_input(calibration, info) for info in calibration.inputs.values()]
    experts = [_experts(name, [int(count) for count in counts]) for name, counts in calibration.routed().items()]
    return Overview(
        asdict(calibration.description),
        sum(each.columns for each in inputs),
        sum(each.modules for each in inputs),
        tuple(sorted(inputs, key=lambda each: (-(each.ratio or 0.0), -each.amax, each.name))),
        tuple(sorted(experts, key=lambda each: (each.least, -each.few, each.name))),
        dict(sorted(calibration.sensitivities.items(), key=lambda item: (-item[1], item[0]))),
    )


def _input(calibration: Calibration, info: InputInfo) -> InputOverview:
    found = calibration.read(info)
    ratio = None
    if found.second_moment is not None:
        rms = float(np.sqrt(found.second_moment.mean(dtype=np.float64)))
        ratio = found.amax / rms if rms else 0.0
    return InputOverview(info.name, info.columns, len(info.modules), found.tokens, found.amax, ratio)


def _experts(name: str, counts: list[int]) -> ExpertsOverview:
    few = sum(count < FEW_TOKENS for count in counts)
    return ExpertsOverview(name, len(counts), counts.count(0), few, min(counts, default=0), max(counts, default=0))
