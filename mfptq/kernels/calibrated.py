"""The calibrated methods and the interface of their kernels: errors weighted by what a calibration pass saw of each column.

The execution calls `load_calibrated_kernel` once and shares the kernel among its threads. All three methods try the scale codes `base + o` for o in CALIBRATED_OFFSETS, where `base` is the block's scale rounded
to nearest, keep the first with the least error, and differ in the error of a block's differences d:

    weighted   sum over i of (w_i * d_i) * d_i                  w: the columns' second moments, relative
    hessian    sum over i of d_i * (H_ii d_i + 2 sum over j < i of H_ij d_j)
    hessian+   the same, then descent on the values: for each i in turn the value nearest to `x_i - (H d)_i / H_ii`,
               where x_i is the value now, kept if that lowers the error; at most 8 sweeps

Sums are float32, in index order, without contraction, so that all kernels give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..kernels import ErrorStats, QuantizeArgs, TileArray, has_compiler, is_cuda, require_torch
from ..nvfp4 import BLOCK_SIZE, SEARCH_OFFSETS, ByteArray, Float32Array

CALIBRATED_METHODS = ("weighted", "hessian", "hessian+")
CALIBRATED_OFFSETS = (*SEARCH_OFFSETS, -3, 8, -4, 9)
SWEEPS = 8
DESCENT = "descent"
FUNCTIONS = {"weighted": "weighted", "hessian": "hessian", "hessian+": DESCENT}  # names that PTX allows


@dataclass(frozen=True, eq=False)
class PreparedStatistics:
    """What a kernel needs of a weight's input: float32 weights `[K]`, or local Hessians `[K/16, 16, 16]`.

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
        return cls(
            np.broadcast_to(np.eye(BLOCK_SIZE, dtype=np.float32), (columns // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE))
        )

    @staticmethod
    def nbytes(method: str, columns: int) -> int:
        """Return the size of the statistics of so many columns, in bytes; 0 for a method that needs none."""
        return 0 if method not in CALIBRATED_METHODS else 4 * columns * (1 if method == "weighted" else BLOCK_SIZE)

    def part(self, start: int, columns: int) -> PreparedStatistics:
        """Return those of `columns` columns from `start`, both multiples of 16: for a tile of part of a row."""
        step = 1 if self.values.ndim == 1 else BLOCK_SIZE
        first, last = start // step, (start + columns) // step
        return PreparedStatistics(self.values[first:last], self.origin or self, self.start + first)


class CalibratedKernel(Protocol):
    """What quantizes tiles by statistics: `[R, K]` C-contiguous, K a multiple of 16; uint16 means raw bfloat16 bits."""

    name: str

    def quantize(
        self,
        tile: TileArray,
        args: QuantizeArgs,
        statistics: PreparedStatistics,
        *,
        packed: ByteArray,
        scales: ByteArray,
    ) -> ErrorStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""


def load_calibrated_kernel(device: str = "cpu") -> CalibratedKernel:
    """Return the kernel for a device: cpu, cuda or cuda:N; raises UsageError for others and where it cannot be used."""
    if is_cuda(device):
        from .calibrated_cuda import CalibratedCudaKernel

        return CalibratedCudaKernel(device)
    if has_compiler():
        from .calibrated_cpu import CalibratedCpuKernel

        return CalibratedCpuKernel()
    require_torch()
    from .calibrated_torch import CalibratedTorchKernel

    return CalibratedTorchKernel()
