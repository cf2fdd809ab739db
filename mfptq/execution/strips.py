"""Cut a weight whose scales belong to rows or to blocks of rows into strips, each converted by one task.

Called by `execution.engine`. A strip has whole segments only, so that its scales follow from its own values: it is read once
where it fits into a worker's memory, and twice, tile by tile, where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..checkpoint.weights import Weight
from ..dtypes import DTYPE_BITS
from ..fp8 import Int64Array, Segments, minmax_scales, power_scales, search_scales
from ..nvfp4 import Float32Array
from ..planning.jobs import QuantizeWeight
from .memory_budget import MIN_TILE
from .tiles import Tile, tiles


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows of a weight from `first` on that share scales among themselves only, in tiles that fit into the memory.

    `segment` is how many (rows, columns) share a scale; `shape` how many scales the strip has, in rows and columns.
    """

    weight: Weight
    segment: tuple[int, int]
    first: int
    rows: int
    tiles: tuple[Tile, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """How many scales the strip has, in rows and columns."""
        height, width = self.segment
        return -(-self.rows // height), -(-self.weight.columns // width)

    @property
    def scale_index(self) -> int:
        """Which of the weight's scales is the strip's first, counted row by row."""
        return self.first // self.segment[0] * self.shape[1]

    def parts(self, tile: Tile) -> Parts:
        """Return where the segments of a tile begin, and which scales they have."""
        height, width = self.segment
        row, column = divmod(tile.start, self.weight.columns)
        end = column + tile.columns
        edges = np.array([column, *range((column // width + 1) * width, end, width), end], np.int64)
        sizes = np.tile(np.diff(edges), tile.rows)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return Parts(starts, (row - self.first + np.arange(tile.rows)) // height, edges[:-1] // width)


class Parts(NamedTuple):
    """The segments of a tile, row by row: where they begin and the last one ends, and the places of their scales."""

    starts: Int64Array
    rows: Int64Array
    columns: Int64Array

    def merge(self, grid: Float32Array, amax: Float32Array) -> None:
        """Take the segments' largest magnitudes into the grid of those of all scales."""
        found = amax.reshape(len(self.rows), len(self.columns))
        first = np.flatnonzero(np.diff(self.rows, prepend=-1))
        place = np.ix_(self.rows[first], self.columns)
        grid[place] = np.maximum(grid[place], np.maximum.reduceat(found, first, axis=0))

    def put(self, grid: Float32Array, scales: Float32Array) -> None:
        """Put the segments' scales into the grid of all scales."""
        grid[np.ix_(self.rows, self.columns)] = scales.reshape(len(self.rows), len(self.columns))

    def of(self, grid: Float32Array) -> Float32Array:
        """Return each segment's scale."""
        return np.ascontiguousarray(grid[np.ix_(self.rows, self.columns)]).reshape(-1)


def strips(weight: Weight, segment: tuple[int, int], tile_bytes: int) -> Iterator[Strip]:
    """Yield a weight in strips of at most `tile_bytes`, or of one row of segments where that is more."""
    height, width = segment[0], segment[1] or weight.columns
    fitting = tile_bytes * 8 // DTYPE_BITS[weight.dtype] // weight.columns // height * height
    for first in range(0, weight.rows, fitting or height):
        rows = min(fitting or height, weight.rows - first)
        yield Strip(weight, (height, width), first, rows, tuple(tiles(weight, tile_bytes, range(first, first + rows))))


def segments(step: QuantizeWeight, parts: Parts, amax: Float32Array) -> Segments:
    """Return how to quantize a tile's segments, of the grid of its strip's largest magnitudes.

    `minmax` does what compressed-tensors does. `search` scales exactly to the top, or as compressed-tensors where the error
    of a row is less so; that only in rows that are never cut, since where they are cut depends on the memory.
    """
    weight = step.weight
    if step.method == "minmax":
        scales = parts.of(minmax_scales(amax, weight.dtype))
        return Segments(parts.starts, scales, scales, exact=True)
    if step.format.power_of_two:
        scales = parts.of(power_scales(amax))
        return Segments(parts.starts, scales, scales, exact=False)
    scales = parts.of(search_scales(amax))
    whole = weight.nbytes // weight.rows <= MIN_TILE
    return Segments(parts.starts, scales, parts.of(minmax_scales(amax, weight.dtype)) if whole else scales, exact=False)
