"""Read part of a matrix that is stored transposed, and transpose it on the way into memory.

Called by `execution.worker_memory` and `comparison`. A panel of columns is read into memory that is free while a tile is
read, and copied from there to where it belongs, so that no more is held than for a plain matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter

from ..checkpoint.source import Source
from ..checkpoint.weights import Weight
from ..dtypes import DTYPE_BITS
from ..kernels import TileArray
from ..kernels.transposing import load_transposer
from ..nvfp4 import ByteArray
from ..storage.files import read_exact
from .tiles import Tile, tiles

_PANEL = 2**19  # bytes: what is read is transposed before it leaves the cache
_LINE = 64  # bytes: whole cache lines are written of each row
_GAP = 4096  # bytes between columns that are read with them: a call for each column costs as much


def read_transposed(source: Source, tile: Tile, out: TileArray, room: ByteArray) -> None:
    """Write a tile's values to `out`, flat, row after row; `room` is memory for a panel, at least one column of the tile."""
    weight, width = tile.weight, out.itemsize
    first, begin = divmod(tile.start, weight.columns)
    step, values = weight.pitch * width, out.reshape(tile.rows, tile.columns)
    offset = weight.offset + first * width + begin * step
    room = room[:_PANEL]
    span = _span(tile, len(room))
    count = _columns(len(room), span, width)
    with source.reading(weight.shard, offset, (tile.columns - 1) * step + tile.rows * width) as fd:
        for column in range(0, tile.columns, count):
            columns = min(count, tile.columns - column)
            panel = room[: columns * span * width].reshape(columns, -1)
            if fd is None:
                _fetch_panel(source, tile, offset + column * step, panel)
            else:
                _read_panel(fd, tile, offset + column * step, panel)
            load_transposer().transpose(panel.view(out.dtype)[:, : tile.rows], values[:, column : column + columns])


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

    A whole stored matrix, gate and up as one, is contiguous: its largest magnitude is that of its transpose.
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


def _read_panel(fd: int, tile: Tile, offset: int, panel: ByteArray) -> None:
    """Fill `panel`, bytes `[columns, ...]`, with columns of the stored matrix, from `offset` of the file on."""
    step = _step(tile)
    if panel.shape[1] == step:
        read_exact(fd, _wanted(tile, panel), offset)
    else:
        load_transposer().read(fd, panel, offset, step)


def _fetch_panel(source: Source, tile: Tile, offset: int, panel: ByteArray) -> None:
    """Fill `panel` as `_read_panel` does, from a source that lends no file."""
    step = _step(tile)
    if panel.shape[1] == step:
        source.read_into(tile.weight.shard, offset, _wanted(tile, panel))
        return
    for column, row in enumerate(panel):
        source.read_into(tile.weight.shard, offset + column * step, row.data)


def _step(tile: Tile) -> int:
    """Return how far columns are apart, in bytes."""
    return tile.weight.pitch * DTYPE_BITS[tile.weight.dtype] // 8


def _wanted(tile: Tile, panel: ByteArray) -> memoryview:
    """Return a panel but for the gap behind its last column, which may lie behind the end of the file."""
    gap = panel.shape[1] - tile.rows * DTYPE_BITS[tile.weight.dtype] // 8
    return panel.reshape(-1).data[: panel.size - gap]
