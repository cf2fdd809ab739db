"""Validate the statistics of a calibration file: finite, non-negative, positive semi-definite.

Called by `calibration.reading` for every input before any is used. Nothing is repaired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..errors import ScaleError, quote
from ..nvfp4 import BLOCK_SIZE, Float32Array
from .file import ROUTED, InputInfo, InputStatistics, Int64Array

Float64Array = npt.NDArray[np.float64]

PSD_TOLERANCE = 1e-5  # of a block's largest diagonal entry: float32 rounding of 256 entries stays below 4e-6
MEAN_TOLERANCE = 1e-3
FACTORS_TOLERANCE = 1e-3  # of the same: they are carried from sample to sample in float32
SLICE_BLOCKS = 64  # float64 copies of this many blocks are 128 KiB each


def check_statistics(info: InputInfo, statistics: InputStatistics) -> None:
    """Raise ScaleError for values that no calibration pass can produce."""
    name = quote(info.name)
    if not (math.isfinite(statistics.amax) and statistics.amax >= 0):
        raise ScaleError(f"amax of {name} is {statistics.amax:g}, expected a finite number that is not negative")
    if statistics.tokens is not None and statistics.tokens < 1:
        raise ScaleError(f"{name} has {statistics.tokens} tokens, expected at least one")
    moment = statistics.second_moment
    if moment is None:
        return
    sound = np.isfinite(moment) & (moment >= 0)
    if not sound.all():
        bad = int(np.flatnonzero(~sound)[0])
        raise ScaleError(f"second_moment of {name} is {moment[bad]:g} at {bad}, expected a finite number, not negative")
    if float(moment.max()) > statistics.amax**2 * (1 + MEAN_TOLERANCE):
        raise ScaleError(
            f"second_moment of {name} reaches {moment.max():g}, more than the square of its amax {statistics.amax:g}"
        )
    if statistics.hessian is not None:
        for start in range(0, len(statistics.hessian), SLICE_BLOCKS):
            part = slice(start, start + SLICE_BLOCKS)
            _check_hessian(name, start, statistics.hessian[part], moment.reshape(-1, BLOCK_SIZE)[part])
            if statistics.factors is not None:
                columns = slice(start * BLOCK_SIZE, (start + SLICE_BLOCKS) * BLOCK_SIZE)
                _check_factors(name, start, statistics.hessian[part], statistics.factors[:, columns])


def _check_hessian(name: str, start: int, hessian: Float32Array, moment: Float32Array) -> None:
    if not np.isfinite(hessian).all():  # before any conversion: signalling NaN warns
        raise ScaleError(f"hessian of {name} is not finite")
    blocks = hessian.astype(np.float64)
    diagonal = np.diagonal(blocks, axis1=1, axis2=2)
    slack = PSD_TOLERANCE * np.abs(diagonal).max(axis=1)
    if (np.abs(blocks - blocks.transpose(0, 2, 1)).max(axis=(1, 2)) > slack).any():
        raise ScaleError(f"hessian of {name} is not symmetric")
    if (np.abs(diagonal - moment).max(axis=1) > slack).any():
        raise ScaleError(f"hessian of {name} has another diagonal than its second_moment")
    bad = _negative(blocks, slack)
    if bad is not None:
        raise ScaleError(
            f"hessian of {name} is not positive semi-definite: block {start + bad[0]} has eigenvalue {bad[1]:.3g}"
        )


def _check_factors(name: str, start: int, hessian: Float32Array, factors: Float32Array) -> None:
    if not np.isfinite(factors).all():
        raise ScaleError(f"factors of {name} are not finite")
    each = factors.astype(np.float64).reshape(len(factors), -1, BLOCK_SIZE)
    blocks = hessian.astype(np.float64)
    slack = FACTORS_TOLERANCE * np.diagonal(blocks, axis1=1, axis2=2).max(axis=1)
    bad = _negative(blocks - np.einsum("rbi,rbj->bij", each, each), slack)
    if bad is not None:
        raise ScaleError(f"factors of {name} are larger than its hessian: in block {start + bad[0]} by {-bad[1]:.3g}")


def _negative(blocks: Float64Array, slack: Float64Array) -> tuple[int, float] | None:
    """Return which block has an eigenvalue below its `-slack`, and the eigenvalue; None if none has."""
    jitter = (slack + 1e-300)[:, None, None] * np.eye(BLOCK_SIZE)
    try:
        np.linalg.cholesky(blocks + jitter)
    except np.linalg.LinAlgError:
        lowest = np.linalg.eigvalsh(blocks)[:, 0]
        bad = int(np.argmin(lowest / np.maximum(slack, 1e-300)))
        if lowest[bad] < -slack[bad]:
            return bad, float(lowest[bad])
    return None


def check_routed(routed: Mapping[str, Int64Array]) -> None:
    """Raise ScaleError for counts of routed tokens that are negative."""
    for name, counts in routed.items():
        if (counts < 0).any():
            raise ScaleError(f"{ROUTED} of {quote(name)} is negative")


def check_sensitivities(found: Mapping[str, float]) -> None:
    """Raise ScaleError for sensitivities that no measurement gives."""
    for name, value in found.items():
        if not 0 <= value < np.inf:
            raise ScaleError(f"sensitivity of {quote(name)} is {value}, expected a finite number from 0 on")


def check_ranges(found: Mapping[str, tuple[float, float]]) -> None:
    """Raise ScaleError for ranges of keys and values that no keys and values have."""
    for name, pair in found.items():
        if not all(0 <= value < np.inf for value in pair):
            raise ScaleError(
                f"ranges of keys and values of {quote(name)} are {list(pair)}, expected finite numbers from 0 on"
            )
