"""Tall tiles: all rows and columns once, within the memory that is there, and pieces of the file that are longer."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from mfptq.checkpoint.source import FolderSource
from mfptq.checkpoint.weights import Weight
from mfptq.execution.memory_budget import buffer_bytes
from mfptq.execution.tall_tiles import column_parts, part_bytes, tall_tiles
from mfptq.execution.tiles import Tile, tiles
from mfptq.execution.worker_memory import WorkerMemory
from mfptq.kernels import load_kernel
from tests.conftest import sampled

SIZES = [(8192, 5120), (5120, 8192), (2736, 5120), (100, 1 << 20), (100, 1 << 12), (1, 64), (70_000, 16), (33, 4112)]
CUTS = [(*size, tile_bytes) for size in SIZES for tile_bytes in (64, 1000, 2**16, 2**22, 2**23)]


def matrix(rows: int, columns: int, dtype: str = "BF16") -> Weight:
    return Weight("a", "a.safetensors", dtype, 0, rows, columns, pitch=2 * rows)


def is_quick(cut: tuple[int, int, int]) -> bool:
    """Return whether a matrix makes few enough tiles for every run of the tests."""
    rows, columns, tile_bytes = cut
    return rows * columns <= 8000 * tile_bytes


def is_tall(tile: Tile, tile_bytes: int) -> bool:
    return tile.nbytes > tile_bytes


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize(
    ("rows", "columns", "tile_bytes"), sampled(filter(is_quick, CUTS), itertools.filterfalse(is_quick, CUTS))
)
def test_every_row_is_in_one_tile_and_every_column_in_one_part(
    rows: int, columns: int, tile_bytes: int, dtype: str
) -> None:
    place = 0
    for tile in tall_tiles(matrix(rows, columns, dtype), tile_bytes):
        assert tile.start == place
        place += tile.size
        if not is_tall(tile, tile_bytes):
            continue
        assert tile.columns == columns
        assert tile.size // 2 + tile.size // 16 <= buffer_bytes(tile_bytes) - buffer_bytes(part_bytes(tile_bytes))
        ends = [part.start - tile.start for part in column_parts(tile, part_bytes(tile_bytes))]
        for part, (begin, end) in zip(
            column_parts(tile, part_bytes(tile_bytes)), itertools.pairwise([*ends, columns]), strict=True
        ):
            assert (part.rows, part.columns) == (tile.rows, end - begin)
            assert part.columns % 16 == 0
            assert part.nbytes <= part_bytes(tile_bytes)
    assert place == rows * columns


@pytest.mark.parametrize(("rows", "columns"), [(8192, 5120), (5120, 8192)])
def test_pieces_are_three_times_as_long(rows: int, columns: int) -> None:
    weight = matrix(rows, columns)
    shortest = min(tile.rows for tile in tall_tiles(weight, 2**23))
    assert shortest >= 3 * max(tile.rows for tile in tiles(weight, 2**23))


def test_matrices_that_are_stored_plainly_are_cut_as_ever() -> None:
    weight = matrix(8192, 5120)._replace(pitch=0)
    assert list(tall_tiles(weight, 2**23)) == list(tiles(weight, 2**23))


def test_parts_and_codes_do_not_overlap() -> None:
    memory = WorkerMemory(FolderSource(Path()), load_kernel(), 2**16)
    parts, codes = memory.for_parts()
    codes[:] = 1
    tile = Tile(matrix(16, 64), 0, 16, 64)
    for room in (np.frombuffer(parts.bytes, np.uint8), *parts.room(tile)):
        room[:] = 2
    assert (codes == 1).all()
    assert len(codes) + buffer_bytes(part_bytes(2**16)) == buffer_bytes(2**16)
    assert memory.tile_bytes == 2**16
