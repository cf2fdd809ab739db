"""Cut matrices that are stored transposed into tiles of so many rows that only their codes fit into a worker's memory.

Called by `execution.families` and `execution.conversions`. All columns of a tile's rows must be in memory before they are
written, and each column is a piece of the file as long as the tile is tall. As codes four times as many rows fit as values,
and the pieces are that much longer: a system call for each is what reading them costs. Values are there for some columns at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..checkpoint.weights import Weight
from ..dtypes import DTYPE_BITS
from ..nvfp4 import BLOCK_SIZE
from .memory_budget import buffer_bytes
from .tiles import Tile, tiles

_VALUES = 6  # which part of the memory is for values and what becomes of them; the rest is for the codes of the tile
_ALIGNED = 64  # bytes
_LINE = 32  # columns: parts begin where cache lines do


def part_bytes(tile_bytes: int) -> int:
    """Return what the values of a part may take of a worker's memory for tiles of so many bytes."""
    return tile_bytes // _VALUES // _ALIGNED * _ALIGNED


def tall_tiles(weight: Weight, tile_bytes: int) -> Iterator[Tile]:
    """Yield a matrix that is stored transposed in tall tiles, where they are taller than others; any other as `tiles` does."""
    rows = _rows(weight, tile_bytes) if weight.pitch else 0
    if rows * weight.nbytes <= tile_bytes * weight.rows:
        yield from tiles(weight, tile_bytes)
        return
    count = -(-weight.rows // rows)
    rows = min(rows, -(-weight.rows // (count * BLOCK_SIZE)) * BLOCK_SIZE)  # none is much shorter than the others
    for row in range(0, weight.rows, rows):
        yield Tile(weight, row * weight.columns, min(rows, weight.rows - row), weight.columns)


def column_parts(tile: Tile, nbytes: int) -> Iterator[Tile]:
    """Yield a tall tile in parts, all rows of some columns each, of so many bytes at most."""
    columns = nbytes // (tile.rows * DTYPE_BITS[tile.weight.dtype] // 8)
    columns = columns // _LINE * _LINE or BLOCK_SIZE
    for column in range(0, tile.columns, columns):
        yield Tile(tile.weight, tile.start + column, tile.rows, min(columns, tile.columns - column))


def _rows(weight: Weight, tile_bytes: int) -> int:
    """Return how many rows have codes that fit into the memory beside the values of a block of columns."""
    values = part_bytes(tile_bytes)
    codes = weight.columns // 2 + weight.columns // BLOCK_SIZE
    block = BLOCK_SIZE * DTYPE_BITS[weight.dtype] // 8
    return min((buffer_bytes(tile_bytes) - buffer_bytes(values)) // codes, values // block)
