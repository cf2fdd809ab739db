"""Read part of a matrix that is stored transposed, and turn it on the way into memory.

Called by `worker_memory`. A panel of columns is read into memory that is free while a tile is read, and copied from there
to where it belongs, so that no more is held than for a plain matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter

import numpy as np

from ..checkpoint.source import Source
from ..checkpoint.weights import Weight
from ..dtypes import NUMPY_DTYPES
from ..kernels import TileArray
from ..nvfp4 import ByteArray
from ..storage.files import read_exact, read_strided
from .tiles import Tile, stored_end, tiles

_PANEL = 2**19  # bytes: what is read is turned before it leaves the cache
_AT_ONCE = 64  # columns of a block: what is written of a row fills whole cache lines
_ROWS = 512  # of a block, which then fits into the processor's nearest caches
_PADDING = 32  # values behind each column: powers of two apart, columns would push each other out of the cache
_WASTE = 2  # read up to so many times what is wanted in one call, rather than in one for each column


def read_turned(source: Source, tile: Tile, out: TileArray, room: ByteArray) -> None:
    """Write a tile's values to `out`, flat, row after row; `room` is memory for a panel, at least one column of the tile."""
    weight, width = tile.weight, out.itemsize
    first, begin = divmod(tile.start, weight.columns)
    values = out.reshape(tile.rows, tile.columns)
    block = np.empty((_AT_ONCE, _ROWS + _PADDING), out.dtype)
    count = _columns(tile, min(len(room), _PANEL) // width)
    for column in range(0, tile.columns, count):
        columns = min(count, tile.columns - column)
        place = weight.offset + (first + (begin + column) * weight.pitch) * width
        panel = _read_panel(source, tile, (place, columns), room).view(out.dtype)[:, : tile.rows]
        _turn(panel, block, values[:, column : column + columns])


def _turn(panel: TileArray, block: TileArray, out: TileArray) -> None:
    """Write a panel, column after column, to `out`, row after row, by way of a block that stays in the cache."""
    for column in range(0, len(panel), _AT_ONCE):
        for row in range(0, len(out), _ROWS):
            part = panel[column : column + _AT_ONCE, row : row + _ROWS]
            columns, rows = part.shape
            block[:columns, :rows] = part
            out[row : row + rows, column : column + columns] = block[:columns, :rows].T


def amax_tiles(weights: Iterable[Weight], tile_bytes: int) -> Iterator[Tile]:
    """Yield tiles that hold all values of the weights of one fused group, as they lie in the file where that is simpler.

    Gate and up that lie side by side are one contiguous matrix: its largest magnitude is that of both.
    """
    spans: dict[tuple[str, int], list[Weight]] = {}
    for weight in weights:
        if weight.pitch:
            spans.setdefault((weight.shard, weight.pitch), []).append(weight)
        else:
            yield from tiles(weight, tile_bytes)
    for (shard, pitch), parts in spans.items():
        first = min(parts, key=attrgetter("offset"))
        end = max(stored_end(weight) for weight in parts)
        if end - first.offset == sum(weight.nbytes for weight in parts):
            stored = Weight(first.module, shard, first.dtype, first.offset, first.columns, pitch)
            yield from tiles(stored, tile_bytes)
        else:
            yield from (tile for weight in parts for tile in tiles(weight, tile_bytes))


def _span(tile: Tile) -> int:
    """Return how many elements of each column are read: with the gaps where they are small."""
    return tile.weight.pitch if tile.weight.pitch <= _WASTE * tile.rows else tile.rows


def _columns(tile: Tile, elements: int) -> int:
    return max(1, elements // _span(tile))


def _read_panel(source: Source, tile: Tile, place: tuple[int, int], room: ByteArray) -> ByteArray:
    """Return columns of the stored matrix as bytes `[columns, ...]`; `place` is where they begin, and how many they are."""
    offset, columns = place
    weight, span = tile.weight, _span(tile)
    width = np.dtype(NUMPY_DTYPES[weight.dtype]).itemsize
    panel = room[: columns * span * width].reshape(columns, span * width)
    wanted, step = tile.rows * width, weight.pitch * width
    with source.reading(weight.shard, offset, (columns - 1) * step + wanted) as fd:
        if fd is None and span == weight.pitch:
            source.read_into(weight.shard, offset, panel.reshape(-1).data[: (columns - 1) * step + wanted])
        elif fd is None:
            for column, row in enumerate(panel):
                source.read_into(weight.shard, offset + column * step, row.data)
        elif span == weight.pitch:
            read_exact(fd, panel.reshape(-1).data[: (columns - 1) * step + wanted], offset)
        else:
            read_strided(fd, panel.data, offset, step)
    return panel
