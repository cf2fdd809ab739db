"""Input scales as they were found, by the names that their file has.

Made by `scales.reading`, `scales.uncalibrated` and calibration files; `scales.assignment` matches the names to the source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.companions import SMOOTHING
from ..checkpoint.small_files import read_file
from ..checkpoint.source import Source
from ..errors import ScaleError, quote
from ..limits import MAX_INDEX_BYTES

AUTO = "auto"  # in place of a path: scales without calibration


@dataclass(frozen=True, slots=True)
class InputScales:
    """`input_global_scale` (2688 / amax, float32) by module name as written in `origin`, a path.

    0, NaN, infinity and exactly 1 are what tools write for a module that calibration never reached. `about` says how the
    numbers came about, for people; `smoothing` is the SHA-256 of the factors of the inputs that they are of, "" for inputs as
    they are in the source.
    """

    global_scales: Mapping[str, float]
    origin: str
    about: str = "imported"
    smoothing: str = ""

    def check_smoothing(self, source: Source) -> None:
        """Raise ScaleError for scales of smoothed inputs, unless those of the source are smoothed by the same factors."""
        if self.smoothing and self.smoothing != smoothing_of(source):
            raise ScaleError(
                f"input scales {quote(self.origin)} are of smoothed inputs, see its {SMOOTHING}, and fit no others: take the "
                "calibration file, or an output that was made without smoothing"
            )


def smoothing_of(source: Source) -> str:
    """Return the SHA-256 of the factors that a checkpoint's inputs are smoothed by, "" if they are not."""
    if SMOOTHING not in source.files():
        return ""
    return hashlib.sha256(read_file(source, SMOOTHING, MAX_INDEX_BYTES)).hexdigest()
