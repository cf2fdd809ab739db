"""Input scales as they were found, by the names that their file has.

Made by `scales.reading`, `scales.uncalibrated` and calibration files; `scales.assignment` matches the names to the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

AUTO = "auto"  # in place of a path: scales without calibration


@dataclass(frozen=True, slots=True)
class InputScales:
    """`input_global_scale` (2688 / amax, float32) by module name as written in `origin`, a path.

    0, NaN, infinity and exactly 1 are what tools write for a module that calibration never reached. `about` says how the
    numbers came about, for people.
    """

    global_scales: Mapping[str, float]
    origin: str
    about: str = "imported"
