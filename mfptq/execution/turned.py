"""Read part of a matrix that is stored transposed, and turn it on the way into memory.

Called by `worker_memory`. A panel of columns is read into memory that is free while a tile is read, and copied from there
to where it belongs, so that no more is held than for a plain matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter

from ..checkpoint.source import Source
from ..checkpoint.weights import Weight
from ..dtypes import DTYPE_BITS
from ..kernels import TileArray
from ..kernels.turning import load_turner
from ..nvfp4 import ByteArray
from ..storage.files import read_exact
from .tiles import Tile, tiles

_PANEL = 2**19  # bytes: what is read is turned before it leaves the cache
_LINE = 64  # bytes: whole cache lines are written of each row
_GAP = 4096  # bytes between columns that are read with them: a call for each column costs as much


def read_turned(source: Source, tile: Tile, out: TileArray, room: ByteArray) -> None:
    """Write a tile's values to `out`, flat, row after row; `room` is memory for a panel, at least one column of the tile."""
    weight, width = tile.weight, out.itemsize
    first, begin = divmod(tile.start, weight.columns)
    values = out.reshape(tile.rows, tile.columns)
    turner = load_turner()
    room = room[:_PANEL]
    span = _span(tile, len(room))
    count = _columns(len(room), span, width)
    for column in range(0, tile.columns, count):
        columns = min(count, tile.columns - column)
        place = weight.offset + (first + (begin + column) * weight.pitch) * width
        panel = _read_panel(source, tile, place, room[: columns * span * width].reshape(columns, -1)).view(out.dtype)[
            :, : tile.rows
        ]
        turner.turn(panel, values[:, column : column + columns])


def joined(weights: Iterable[Weight]) -> Iterator[Weight]:
    """Yield weights, those that lie side by side in one stored matrix as one: gate and up, whose rows follow each other."""
    last: Weight | None = None
    for weight in weights:
        if last is not None and _continues(weight, last):
            last = last._replace(rows=last.rows + weight.rows)
        else:
            if last is not None:
                yield last
            last = weight
    if last is not None:
        yield last


def _continues(weight: Weight, last: Weight) -> bool:
    """Return whether the rows of a weight are the next ones of the stored matrix that another lies in."""
    end = last.offset + last.rows * DTYPE_BITS[last.dtype] // 8
    place = last._replace(module=weight.module, offset=end, rows=weight.rows)
    return weight.pitch >= last.rows + weight.rows and weight == place


def amax_tiles(weights: Iterable[Weight], tile_bytes: int) -> Iterator[Tile]:
    """Yield tiles that hold all values of the weights of one fused group, as they lie in the file where that is simpler.

    A whole stored matrix, gate and up as one, is contiguous: its largest magnitude is the same as that of what it is turned to.
    """
    for weight in joined(sorted(weights, key=attrgetter("shard", "offset"))):
        if weight.rows == weight.pitch:
            yield from tiles(weight._replace(rows=weight.columns, columns=weight.pitch, pitch=0), tile_bytes)
        else:
            yield from tiles(weight, tile_bytes)


def _span(tile: Tile, room: int) -> int:
    """Return how many elements of each column are read: with the gaps where they are small."""
    pitch, width = tile.weight.pitch, DTYPE_BITS[tile.weight.dtype] // 8
    return pitch if (pitch - tile.rows) * width <= _GAP and pitch * width <= room else tile.rows


def _columns(room: int, span: int, width: int) -> int:
    """Return how many columns fit into so many bytes: as many as fill whole cache lines of a row, if there is room."""
    count, line = room // (span * width), _LINE // width
    return count // line * line or max(1, count)


def _read_panel(source: Source, tile: Tile, offset: int, panel: ByteArray) -> ByteArray:
    """Fill `panel`, bytes `[columns, ...]`, with columns of the stored matrix, from `offset` of the file on."""
    weight, (columns, span) = tile.weight, panel.shape
    width = DTYPE_BITS[weight.dtype] // 8
    step = weight.pitch * width
    size = (columns - 1) * step + tile.rows * width
    with source.reading(weight.shard, offset, size) as fd:
        if fd is None and span == step:
            source.read_into(weight.shard, offset, panel.reshape(-1).data[:size])
        elif fd is None:
            for column, row in enumerate(panel):
                source.read_into(weight.shard, offset + column * step, row.data)
        elif span == step:
            read_exact(fd, panel.reshape(-1).data[:size], offset)
        else:
            load_turner().read(fd, panel, offset, step)
    return panel
