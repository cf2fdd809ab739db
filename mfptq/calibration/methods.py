"""Choose the method that statistics allow, and prepare them as a kernel takes them.

Called by `calibration.reading`. Statistics that a method needs and the file lacks are an error, never made up.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..errors import ScaleError
from ..kernels.calibrated import FEEDBACK, PreparedStatistics
from ..nvfp4 import BLOCK_SIZE, Float32Array
from .checks import SLICE_BLOCKS
from .feedback import feedback_statistics
from .file import Description, InputStatistics, Level, includes

SHRINKAGE_TOKENS = 100  # chosen on text that no published figure was measured on: see docs/calibration.md

_NEEDS: Mapping[str, Level] = {"weighted": "moments", "hessian": "hessian", "hessian+": "hessian", FEEDBACK: "factors"}
_STRONGEST: Mapping[Level, str] = {
    "amax": "search", "moments": "weighted", "hessian": "hessian+", "factors": FEEDBACK,
}  # fmt: skip


def choose_method(description: Description, requested: str) -> str:
    """Return the method for inputs of which so much is known; raises ScaleError if that is less than it needs."""
    level = description.statistics
    if requested == "auto":
        return _STRONGEST[level]
    needs = _NEEDS.get(requested)
    if needs is not None and not includes(level, needs):
        raise ScaleError(f"method {requested} needs a calibration file with statistics {needs}, this one has {level}")
    return requested


def prepare(statistics: InputStatistics, method: str) -> PreparedStatistics:
    """Return the importance of each column, the local Hessian, or what feedback needs, as the kernels take them."""
    if method == "weighted":
        assert statistics.second_moment is not None
        return PreparedStatistics(importance(statistics.second_moment))
    assert statistics.hessian is not None
    assert statistics.tokens is not None
    if method == FEEDBACK:
        assert statistics.factors is not None
        kept = 1.0 - shrinkage(statistics.tokens)
        return PreparedStatistics(feedback_statistics(statistics.hessian, statistics.factors, kept))
    return PreparedStatistics(local_hessian(statistics.hessian, statistics.tokens))


def importance(second_moment: Float32Array) -> Float32Array:
    """Return float32 `[K]` weights of squared errors: relative to the block's mean, none quite zero.

    Only ratios inside a block of 16 matter, since each block is searched alone; a block that is all zero counts as 1.
    """
    blocks = second_moment.reshape(-1, BLOCK_SIZE).astype(np.float64)
    mean = blocks.mean(axis=1, keepdims=True)
    relative = np.divide(blocks, mean, out=np.ones_like(blocks), where=mean > 0) + 1e-6
    return np.asarray(relative.reshape(-1), np.float32)


def shrinkage(tokens: int) -> float:
    """Return the share of a local Hessian's correlations that is noise: 0.55 at 500 tokens, 0.36 at 2,000, 0.17 at 20,000."""
    return float((SHRINKAGE_TOKENS / (SHRINKAGE_TOKENS + tokens)) ** (1 / 3))


def local_hessian(blocks: Float32Array, tokens: int) -> Float32Array:
    """Return float32 `[K/16, 16, 16]`, each block relative to its mean diagonal, and shrunk towards its own diagonal.

    The less text, the more: its off-diagonal entries are taken times `1 - shrinkage(tokens)`. A block that is all zero,
    of channels that never spoke, counts as the identity.
    """
    kept = 1.0 - shrinkage(tokens)
    result = np.empty(blocks.shape, np.float32)
    for start in range(0, len(blocks), SLICE_BLOCKS):
        part = slice(start, start + SLICE_BLOCKS)
        result[part] = _shrunk(blocks[part].astype(np.float64), kept)
    return result


def _shrunk(exact: npt.NDArray[np.float64], kept: float) -> npt.NDArray[np.float64]:
    mean = np.diagonal(exact, axis1=1, axis2=2).mean(axis=1)[:, None, None]
    identity = np.broadcast_to(np.eye(BLOCK_SIZE), exact.shape)
    relative = np.divide(exact, mean, out=identity.copy(), where=mean > 0)
    own = np.diagonal(relative, axis1=1, axis2=2)[:, :, None] * identity
    relative = kept * relative + (1 - kept) * own
    result: npt.NDArray[np.float64] = (relative + relative.transpose(0, 2, 1)) / 2 + 1e-6 * identity
    return result
