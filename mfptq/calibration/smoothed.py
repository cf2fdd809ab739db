"""Say what the statistics of an input become when its channels are divided by powers of two, without another pass.

Called by `calibration.reading`. Moments follow exactly. Of the largest magnitude only a bound does, since the file has one for
all channels together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..nvfp4 import BLOCK_SIZE
from .file import InputStatistics

Exponents = npt.NDArray[np.int8]


def smoothed(statistics: InputStatistics, exponents: Exponents) -> InputStatistics:
    """Return the statistics of an input whose channel k is divided by `2^exponents[k]`, int8 `[K]`."""
    divided = -exponents.astype(np.int32)
    moment, hessian = statistics.second_moment, statistics.hessian
    blocks = divided.reshape(-1, BLOCK_SIZE)
    return InputStatistics(
        bound(statistics, exponents),
        statistics.tokens,
        None if moment is None else np.ldexp(moment, 2 * divided),
        None if hessian is None else np.ldexp(hessian, blocks[:, :, None] + blocks[:, None, :]),
    )


def bound(statistics: InputStatistics, exponents: Exponents) -> float:
    """Return a magnitude that no value of the divided input has passed.

    No value of a channel is larger than the largest of all channels, nor than the root of its squares' sum.
    """
    reach = np.full(len(exponents), statistics.amax)
    if statistics.second_moment is not None and statistics.tokens is not None:
        reach = np.minimum(reach, np.sqrt(statistics.tokens * statistics.second_moment.astype(np.float64)))
    return float(np.ldexp(reach, -exponents.astype(np.int32)).max())
