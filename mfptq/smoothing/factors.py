"""Choose the factors of an input's channels from its second moments.

Called by `smoothing.plan`. A channel is divided by about the fourth root of its second moment, halfway
between leaving it alone and making all channels equally large, and its columns of the weights are multiplied by the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..encodings.smoothed import Exponents

LIMIT = 8  # no channel is moved by more than 2^8 from the geometric mean: what was 0 may be large in other text
Moments = npt.NDArray[np.float64]


def exponents(moments: Moments, *, offset: float) -> Exponents:
    """Return int8 exponents of the factors of channels with these second moments: powers of two around a geometric mean of 1.

    The weight w of a norm that multiplies by `offset + w` becomes `(offset + w) / factor - offset`, whose rounding matters the
    less the larger the sum is: there the largest factor is 1, so that no sum becomes smaller. A channel of zeros has factor 1.
    """
    nonzero = moments > 0
    if not nonzero.any():
        return np.zeros(len(moments), np.int8)
    quarter = np.log2(moments, out=np.zeros(len(moments)), where=nonzero) / 4
    centred = np.where(nonzero, quarter - quarter[nonzero].mean(), 0)
    found = np.clip(np.rint(centred), -LIMIT, LIMIT).astype(np.int8)
    return np.asarray(found - found.max() if offset else found, np.int8)
