"""The squared error of a layer's output that errors of its weights make, by what is known of its inputs.

Called by `execution.format_errors` and `comparison.measuring`. With Hessian blocks it is the sum of `d^T H d` over rows and
blocks of 16 columns, with second moments the sum of `m_k d_k^2`; both are means over the tokens of the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..kernels import TileArray
from ..nvfp4 import BLOCK_SIZE, Float32Array, as_float32
from .tiles import Tile

if TYPE_CHECKING:
    from ..calibration.reading import Calibration

SLICE_ELEMENTS = 2**15  # of a tile that is looked at once: temporaries stay in the processor's cache
Decoded = Callable[[slice], Float32Array]


@dataclass(frozen=True, slots=True)
class OutputErrors:
    """What is known of an input: second moments `[K]`, and Hessian blocks `[K/16, 16, 16]` if the file has them."""

    moments: Float32Array
    hessian: Float32Array | None

    @classmethod
    def of(cls, calibration: Calibration | None, module: str) -> OutputErrors | None:
        """Return what a calibration file knows of a module's input; None where there are no moments at all.

        An expert that no text reached has an input of zeros: its errors count for nothing.
        """
        if calibration is None or calibration.description.statistics == "amax":
            return None
        found = calibration.known(module)
        if found is None or found.second_moment is None:
            return cls(np.zeros(0, np.float32), None)
        return cls(found.second_moment, found.hessian)

    def cost(self, tile: Tile, data: TileArray, decoded: Decoded) -> float:
        """Return the error of a tile `[R, K]`; `decoded` gives rows of what it becomes."""
        total = 0.0
        for rows in _slices(tile):
            total += self.squared(decoded(rows) - as_float32(data[rows]), tile.start % tile.weight.columns)
        return total

    def norm(self, tile: Tile, data: TileArray) -> float:
        """Return the sum of `m_k w_k^2`: what errors of the inputs that are alike in every column are in proportion to."""
        start = tile.start % tile.weight.columns
        moments = self._moments(start, tile.columns)
        return sum(float((np.square(as_float32(data[rows])) @ moments).sum(dtype=np.float64)) for rows in _slices(tile))

    def _moments(self, start: int, columns: int) -> Float32Array:
        return self.moments[start : start + columns] if len(self.moments) else np.zeros(columns, np.float32)

    def squared(self, errors: Float32Array, start: int) -> float:
        """Return what rows `[R, K]` add to the squared norm of an output; `start` is the column that they begin at."""
        columns = errors.shape[1]
        if self.hessian is None:
            return float((np.square(errors) @ self._moments(start, columns)).sum(dtype=np.float64))
        first = start // BLOCK_SIZE
        blocks = errors.reshape(len(errors), -1, BLOCK_SIZE).transpose(1, 0, 2)  # [K/16, R, 16]
        outer = blocks @ self.hessian[first : first + columns // BLOCK_SIZE]
        return float((outer * blocks).sum(dtype=np.float64))


def _slices(tile: Tile) -> Iterator[slice]:
    step = max(1, SLICE_ELEMENTS // tile.columns)
    return (slice(start, start + step) for start in range(0, tile.rows, step))
