"""Take the input ranges out of a checkpoint in NVFP4 or FP8, as a calibration file.

`extract_scales` is public; `mfptq calibration extract` calls it. The checkpoint is only read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import ScaleError, quote
from ..nvfp4 import INPUT_SCALE_NUMERATOR
from ..scales.experts import is_calibrated
from ..scales.sibling import read_sibling
from ..scales.values import ScaleConvention
from ..storage.files import expanded
from .file import CalibrationContents, Description, InputInfo, InputStatistics, write_calibration


def extract_scales(path: str | Path, output: str | Path, kind: str | None = None) -> Description:
    """Write the input ranges of a checkpoint in NVFP4 or FP8 as a calibration file with statistics `amax`.

    `kind` says what its scales are where neither names nor config tell. A layer whose scale is a mark of no calibration
    (0, NaN, infinity or 1) is left out. Raises ScaleError for a checkpoint without input scales.
    """
    sibling = read_sibling(path, kind)
    if sibling.scales is None:
        raise ScaleError(f"checkpoint {quote(path)} has no input scales: it is weight-only")
    if sibling.scales.smoothing:
        raise ScaleError(f"checkpoint {quote(path)} has smoothed inputs: their ranges fit no other conversion")
    amax = {name: _amax(value) for name, value in sibling.scales.global_scales.items() if is_calibrated(value)}
    if not amax:
        raise ScaleError(f"checkpoint {quote(path)}: every input scale is a mark of no calibration")
    inputs = tuple(InputInfo(name, sibling.layers[name], (name,)) for name in amax)
    description = Description(Path(path).name, "", "amax", origin="extract")
    contents = CalibrationContents(description, inputs, lambda info: InputStatistics(amax[info.name]), {})
    write_calibration(expanded(output), contents)
    return description


def _amax(global_scale: float) -> float:
    """Return the float32 range that gives this `input_global_scale` again, or the one nearest to it where none does."""
    nearest = np.float32(INPUT_SCALE_NUMERATOR / global_scale)
    around = (nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf)))
    convention = ScaleConvention("amax")
    exact = (float(each) for each in around if convention.global_scale("", None, float(each)) == global_scale)
    return next(exact, float(nearest))
