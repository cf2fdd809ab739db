"""Read part of a matrix that is stored transposed, and turn it on the way into memory.

Called by `worker_memory`. A panel of columns is read into memory that is free while a tile is read, and copied from there
to where it belongs, so that no more is held than for a plain matrix.
"""

from __future__ import annotations

import numpy as np

from ..checkpoint.source import FolderSource
from ..dtypes import NUMPY_DTYPES
from ..kernels import TileArray
from ..nvfp4 import ByteArray
from ..storage.files import read_exact, read_strided
from .tiles import Tile

_WASTE = 2  # read up to so many times what is wanted in one call, rather than in one for each column


def read_turned(source: FolderSource, tile: Tile, out: TileArray, room: ByteArray) -> None:
    """Write a tile's values to `out`, flat, row after row; `room` is memory for a panel, at least one column of the tile."""
    weight, width = tile.weight, out.itemsize
    first, begin = divmod(tile.start, weight.columns)
    values = out.reshape(tile.rows, tile.columns)
    count = _columns(tile, len(room) // width)
    for column in range(0, tile.columns, count):
        columns = min(count, tile.columns - column)
        place = weight.offset + (first + (begin + column) * weight.pitch) * width
        panel = _read_panel(source, tile, (place, columns), room).view(out.dtype)
        values[:, column : column + columns] = panel[:, : tile.rows].T


def _span(tile: Tile) -> int:
    """Return how many elements of each column are read: with the gaps where they are small."""
    return tile.weight.pitch if tile.weight.pitch <= _WASTE * tile.rows else tile.rows


def _columns(tile: Tile, elements: int) -> int:
    return max(1, elements // _span(tile))


def _read_panel(source: FolderSource, tile: Tile, place: tuple[int, int], room: ByteArray) -> ByteArray:
    """Return columns of the stored matrix as bytes `[columns, ...]`; `place` is where they begin, and how many they are."""
    offset, columns = place
    weight, span = tile.weight, _span(tile)
    width = np.dtype(NUMPY_DTYPES[weight.dtype]).itemsize
    panel = room[: columns * span * width].reshape(columns, span * width)
    wanted, step = tile.rows * width, weight.pitch * width
    with source.reading(weight.shard, offset, (columns - 1) * step + wanted) as fd:
        if span == weight.pitch:
            read_exact(fd, panel.reshape(-1).data[: (columns - 1) * step + wanted], offset)
        else:
            read_strided(fd, panel.data, offset, step)
    return panel
