"""Prepare statistics for error feedback: Hessian blocks and low-rank factors become what each block of a row needs to know.

Called by `calibration.methods`. An input's Hessian is taken as `D + Z Z^T`: D its 16x16 diagonal blocks less what the factors
say of them, Z the factors. With blocks in an order, `S_b` the sum of `Z_j^T D_j^-1 Z_j` over the blocks j from b on, `d` the
differences of a row that are done and `s` the sum of `Z_j^T d_j` over those, completing the square gives for block b

    its target   w_b - D_b^-1 Z_b (I + S_b)^-1 s
    its metric   D_b + Z_b (I + S_(b+1))^-1 Z_b^T

if all later blocks do their best against its error. That is GPTQ's feedback, by blocks, for a Hessian of this form.

No function of BLAS or LAPACK is used: those round differently from processor to processor, and the bytes of weights depend on
the result. All is float64, element by element, with sums in index order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..kernels.calibrated import feedback_size
from ..nvfp4 import BLOCK_SIZE, Float32Array

Float64Array = npt.NDArray[np.float64]

SLICE_BLOCKS = 16  # in float64 at once: products of so many take 2 MB
LEAST_PIVOT = 1e-5  # of a block's mean diagonal: float32 rounding in the file reaches 4e-6


def feedback_statistics(hessian: Float32Array, factors: Float32Array, kept: float) -> Float32Array:
    """Return float32 `[K/16, 16 * (16 + 2r) + 1]`: a record for each block, in the order in which they are quantized.

    Blocks come by the size of their inputs, the largest first, so that their errors are made up for by the others. A record
    is the metric `[16, 16]` relative to its mean diagonal, the feedback `[r, 16]` that turns s into what is added to the
    weights, the factors `[r, 16]` that turn differences into what is added to s, and the block's place in the row.

    `hessian` is `[K/16, 16, 16]`, `factors` `[r, K]`; `kept` is the share of all correlations that is not taken for noise.
    """
    blocks, rank = len(hessian), len(factors)
    traces = _trace(hessian.astype(np.float64))
    order = np.argsort(-traces, kind="stable")
    unit = float(np.add.accumulate(traces)[-1]) / (blocks * BLOCK_SIZE) or 1.0
    share = np.sqrt(kept / unit)
    columns = factors.reshape(rank, blocks, BLOCK_SIZE)
    records, inverse = np.empty((blocks, feedback_size(rank)), np.float32), np.eye(rank)
    for stop in range(blocks, 0, -SLICE_BLOCKS):
        part = slice(max(0, stop - SLICE_BLOCKS), stop)
        places = order[part]
        known = columns[:, places].astype(np.float64).transpose(1, 2, 0) * share
        own = _shrunk(hessian[places].astype(np.float64) / unit, kept) - _product(known, known.transpose(0, 2, 1))
        metric, feedback, inverse = _backwards(own, known, inverse)
        records[part] = np.concatenate([_relative(metric), _flat(feedback), _flat(known), places[:, None]], axis=1)
    return records


def _shrunk(blocks: Float64Array, kept: float) -> Float64Array:
    """Return blocks with all but their diagonals taken times `kept`."""
    return np.asarray(blocks * (kept + (1 - kept) * np.eye(BLOCK_SIZE)))


def _product(left: Float64Array, right: Float64Array) -> Float64Array:
    """Return the matrix product, of two matrices or of two stacks of them."""
    products = np.multiply(left[..., :, None], right[..., None, :, :], order="C")  # so that rows of sums are added up
    total: Float64Array = np.add.reduce(products, axis=-2)
    return total


def _trace(blocks: Float64Array) -> Float64Array:
    """Return the sum of each block's diagonal."""
    total: Float64Array = sum((blocks[:, i, i] for i in range(BLOCK_SIZE)), np.zeros(len(blocks)))
    return total


def _relative(metric: Float64Array) -> Float64Array:
    """Return each block's metric flat and relative to its mean diagonal, since only ratios matter within a block."""
    relative: Float64Array = (metric / (_trace(metric) / BLOCK_SIZE)[:, None, None]).reshape(len(metric), -1)
    return relative


def _flat(known: Float64Array) -> Float64Array:
    """Return `[16, r]` of each block as `[r * 16]`, the columns of the block side by side."""
    flat: Float64Array = known.transpose(0, 2, 1).reshape(len(known), -1)
    return flat


def _backwards(
    own: Float64Array, known: Float64Array, inverse: Float64Array
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Go through some blocks from the last to the first; return their metrics, feedback, and `(I + S)^-1` before them.

    `own` is D, `known` Z, `inverse` is `(I + S)^-1` behind the last of them.
    """
    lower = _cholesky(own)
    half = _forward(lower, known)
    metric = np.empty_like(own)
    for block in reversed(range(len(own))):
        metric[block] = _product(_product(known[block], inverse), known[block].T)
        for row in half[block]:
            inverse = _with_row(inverse, row)
        half[block] = _product(half[block], inverse)
    # As factored, not as given: pivots may have been raised.
    return metric + _product(lower, lower.transpose(0, 2, 1)), -_backward(lower, half), inverse


def _with_row(inverse: Float64Array, row: Float64Array) -> Float64Array:
    """Return the inverse of a matrix to which `row row^T` is added (Sherman and Morrison)."""
    moved = np.add.reduce(np.multiply(inverse, row[:, None], order="C"), axis=0)
    return np.asarray(inverse - moved[:, None] * moved / (1.0 + float(np.add.accumulate(moved * row)[-1])))


def _cholesky(blocks: Float64Array) -> Float64Array:
    """Return the lower factors of blocks, no pivot less than LEAST_PIVOT of the mean; dead blocks count as the identity."""
    mean = _trace(blocks) / BLOCK_SIZE
    least = np.where(mean > 0, LEAST_PIVOT * mean, 1.0)
    left, lower = blocks.copy(), np.zeros_like(blocks)
    for j in range(BLOCK_SIZE):
        pivot = np.sqrt(np.maximum(left[:, j, j], least))
        lower[:, j:, j] = left[:, j:, j] / pivot[:, None]
        lower[:, j, j] = pivot
        left -= lower[:, :, j, None] * lower[:, None, :, j]
    return lower


def _forward(lower: Float64Array, right: Float64Array) -> Float64Array:
    """Return `L^-1 right` of each block."""
    found: Float64Array = right.copy()
    for j in range(BLOCK_SIZE):
        found[:, j] /= lower[:, j, j, None]
        found[:, j + 1 :] -= lower[:, j + 1 :, j, None] * found[:, None, j]
    return found


def _backward(lower: Float64Array, right: Float64Array) -> Float64Array:
    """Return `L^-T right` of each block."""
    found: Float64Array = right.copy()
    for j in reversed(range(BLOCK_SIZE)):
        found[:, j] /= lower[:, j, j, None]
        found[:, :j] -= lower[:, j, :j, None] * found[:, None, j]
    return found
