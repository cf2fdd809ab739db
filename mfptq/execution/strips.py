"""Cut a weight whose scales belong to rows or to blocks of rows into strips, each converted by one task.

Called by `execution.engine` and `execution.conversions`. A strip has whole segments only, so that its scales follow from its
own values: it is read once where it fits into a worker's memory, and twice, tile by tile, where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..checkpoint.weights import Weight
from ..dtypes import DTYPE_BITS
from ..fp8 import Candidates, Int64Array, Segments, minmax_scales, power_scales, search_scales
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
        return Parts(starts, (row - self.first + np.arange(tile.rows)) // height, edges[:-1] // width, self.shape[1])


class Parts(NamedTuple):
    """The segments of a tile, row by row: where they begin and the last one ends, and the places of their scales.

    `width` is how many scales all rows of scales have.
    """

    starts: Int64Array
    rows: Int64Array
    columns: Int64Array
    width: int

    def merge(self, grid: Float32Array, amax: Float32Array) -> None:
        """Take the segments' largest magnitudes into the grid of those of all scales."""
        found = amax.reshape(len(self.rows), len(self.columns))
        first = np.flatnonzero(np.diff(self.rows, prepend=-1))
        place = np.ix_(self.rows[first], self.columns)
        grid[place] = np.maximum(grid[place], np.maximum.reduceat(found, first, axis=0))

    def put(self, grid: Float32Array, scales: Float32Array) -> None:
        """Put the segments' scales into the grid of all scales."""
        grid[np.ix_(self.rows, self.columns)] = scales.reshape(len(self.rows), len(self.columns))

    @property
    def places(self) -> Int64Array:
        """Which of all scales, counted row by row, each segment has."""
        return (self.rows[:, None] * self.width + self.columns).reshape(-1)

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


class StripScales(NamedTuple):
    """The scales of a strip's segments, `[rows, columns]` of them, and others that are taken where they cost less.

    `exact` asks for the roundings of compressed-tensors. `by_block`: a scale holds for several rows, which choose together.
    """

    scales: Float32Array
    others: Float32Array
    exact: bool
    by_block: bool

    def segments(self, parts: Parts) -> Segments:
        """Return how to quantize a tile's segments."""
        return Segments(parts.starts, parts.of(self.scales), parts.of(self.others), self.exact)

    def settled(self, chosen: Candidates) -> StripScales:
        """Return the scales that blocks have chosen."""
        best = chosen.best.reshape(self.scales.shape)
        return StripScales(best, best, self.exact, by_block=False)


def strip_scales(step: QuantizeWeight, amax: Float32Array) -> StripScales:
    """Return the scales that follow from a strip's largest magnitudes.

    `minmax` does what compressed-tensors does. `search` never errs more, since the scale of compressed-tensors is among those
    that it tries, and it rounds once: blocks get a power of two where that is no worse, rows an exact scale, but for rows so
    long that they may be cut, where the memory would decide.
    """
    weight = step.weight
    theirs = minmax_scales(amax, weight.dtype)
    if step.method == "minmax":
        return StripScales(theirs, theirs, exact=True, by_block=False)
    if step.format.power_of_two:
        return StripScales(power_scales(amax), theirs, exact=False, by_block=True)
    whole = weight.nbytes // weight.rows <= MIN_TILE
    return StripScales(search_scales(amax) if whole else theirs, theirs, exact=False, by_block=False)
