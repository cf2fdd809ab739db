"""The calibrated methods and what they need: errors weighted by what a calibration pass saw of each column.

Called by the kernels, by `calibration`, which prepares statistics, and by `planning`. All methods try the scale codes
`base + o` for o in CALIBRATED_OFFSETS, where `base` is the block's scale rounded to nearest, keep the first with the least error,
and differ in the error of a block's differences d:

    weighted   sum over i of (w_i * d_i) * d_i                  w: the columns' second moments, relative
    hessian    sum over i of d_i * (H_ii d_i + 2 sum over j < i of H_ij d_j)
    hessian+   the same, then descent on the values: for each i in turn the value nearest to `x_i - (H d)_i / H_ii`,
               where x_i is the value now, kept if that lowers the error; at most 8 sweeps
    gptq       as hessian+, block after block of a row: what is quantized is `x_i + sum over k of F_ki s_k`, H the metric, and
               then s_k grows by the sum over i of Z_ki times the difference from x_i; s begins with zeros in every row
               (`calibration.feedback` says what F, Z and the metric are)

Sums are float32, in index order, without contraction, so that all kernels give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..nvfp4 import BLOCK_SIZE, SEARCH_OFFSETS, Float32Array

LOCAL_METHODS = ("weighted", "hessian", "hessian+")  # of which a block needs to know its own columns alone
FEEDBACK = "gptq"
CALIBRATED_METHODS = (*LOCAL_METHODS, FEEDBACK)
CALIBRATED_OFFSETS = (*SEARCH_OFFSETS, -3, 8, -4, 9)
SWEEPS = 8
MAX_RANK = 64  # of factors: so many sums a kernel keeps for each row
DESCENT = "descent"
FUNCTIONS = {"weighted": "weighted", "hessian": "hessian", "hessian+": DESCENT, FEEDBACK: FEEDBACK}  # as PTX allows


def feedback_size(rank: int) -> int:
    """Return how many float32 numbers a block's record for FEEDBACK has: metric, feedback, factors, and its place."""
    return BLOCK_SIZE * (BLOCK_SIZE + 2 * rank) + 1


@dataclass(frozen=True, eq=False)
class PreparedStatistics:
    """What a kernel needs of a weight's input: float32 weights `[K]`, local Hessians `[K/16, 16, 16]`, or records for FEEDBACK,
    `[K/16, feedback_size(rank)]`.

    `origin` is set for a part of them, which begins at `start` of the origin's values. Equal only to itself, so that a
    kernel can keep a copy on its device for as long as the original lives.
    """

    values: Float32Array
    origin: PreparedStatistics | None = None
    start: int = 0

    @classmethod
    def neutral(cls, method: str, columns: int) -> PreparedStatistics:
        """Return statistics under which every value counts the same."""
        if method == "weighted":
            return cls(np.ones(columns, np.float32))
        blocks = columns // BLOCK_SIZE
        metric = np.broadcast_to(np.eye(BLOCK_SIZE, dtype=np.float32), (blocks, BLOCK_SIZE, BLOCK_SIZE))
        if method != FEEDBACK:
            return cls(metric)
        places = np.arange(blocks, dtype=np.float32)[:, None]
        return cls(np.concatenate([metric.reshape(blocks, -1), places], axis=1))

    @staticmethod
    def nbytes(method: str, columns: int) -> int:
        """Return the most that the statistics of so many columns take, in bytes; 0 for a method that needs none."""
        if method == FEEDBACK:
            return 4 * columns // BLOCK_SIZE * feedback_size(min(MAX_RANK, columns))
        return 0 if method not in CALIBRATED_METHODS else 4 * columns * (1 if method == "weighted" else BLOCK_SIZE)

    @property
    def rank(self) -> int:
        """How many factors records for FEEDBACK have."""
        assert self.values.ndim == 2
        return int(self.values.shape[1] - feedback_size(0)) // (2 * BLOCK_SIZE)

    def part(self, start: int, columns: int) -> PreparedStatistics:
        """Return those of `columns` columns from `start`, both multiples of 16: for a tile of part of a row.

        Records for FEEDBACK are of whole rows only.
        """
        if self.values.ndim == 2:
            assert (start, columns) == (0, len(self.values) * BLOCK_SIZE)
            return self
        step = 1 if self.values.ndim == 1 else BLOCK_SIZE
        first, last = start // step, (start + columns) // step
        return PreparedStatistics(self.values[first:last], self.origin or self, self.start + first)
