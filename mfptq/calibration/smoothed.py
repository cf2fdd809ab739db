"""Compute the statistics of an input whose channels are divided by powers of two, without another pass.

Called by `calibration.reading` and `smoothing.plan`. Moments follow exactly. The largest magnitude is estimated, since the file
has one for all channels together.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..nvfp4 import BLOCK_SIZE, Float32Array
from .file import InputStatistics

Exponents = npt.NDArray[np.int8]
PEAK = 64.0  # a channel that is large in one token of 4096, the first as it is in many models, has this ratio


def smoothed(statistics: InputStatistics, exponents: Exponents) -> InputStatistics:
    """Return the statistics of an input whose channel k is divided by `2^exponents[k]`, int8 `[K]`."""
    divided = -exponents.astype(np.int32)
    blocks = divided.reshape(-1, BLOCK_SIZE)
    return replace(
        statistics,
        amax=largest(statistics, exponents),
        second_moment=_times(statistics.second_moment, 2 * divided),
        hessian=_times(statistics.hessian, blocks[:, :, None] + blocks[:, None, :]),
        factors=_times(statistics.factors, divided),
    )


def _times(values: Float32Array | None, exponents: npt.NDArray[np.int32]) -> Float32Array | None:
    return None if values is None else np.ldexp(values, exponents)


def largest(statistics: InputStatistics, exponents: Exponents) -> float:
    """Return about the largest magnitude of the divided input, on the high side.

    No value of a channel is larger than the largest of all channels, nor than the root of its squares' sum; and none is taken
    to be more than PEAK times its root mean square, lest much text make the range much too wide.
    """
    reach = np.full(len(exponents), statistics.amax)
    if statistics.second_moment is not None and statistics.tokens is not None:
        peak = min(PEAK, math.sqrt(statistics.tokens))
        reach = np.minimum(reach, peak * np.sqrt(statistics.second_moment.astype(np.float64)))
    return float(np.ldexp(reach, -exponents.astype(np.int32)).max())
