"""Matrices transposed: compiled and by numpy, whatever the sizes, and read from files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mfptq.kernels.transposing import CompiledTransposer, NumpyTransposer, Transposer, load_transposer

TRANSPOSERS = pytest.mark.parametrize(
    "transposer", [CompiledTransposer(), NumpyTransposer()], ids=["compiled", "numpy"]
)
GUARD = 0xA5


@TRANSPOSERS
@pytest.mark.parametrize("dtype", [np.uint16, np.float16, np.float32])
@pytest.mark.parametrize("columns", [1, 15, 16, 31, 32, 33, 64, 95, 130])
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8, 9, 40, 515])
def test_a_column_becomes_a_row_and_nothing_else_is_written(
    transposer: Transposer, dtype: type, columns: int, rows: int
) -> None:
    rng = np.random.default_rng(columns * 1000 + rows)
    width = np.dtype(dtype).itemsize
    panel = rng.integers(0, 256, (columns, (rows + 5) * width), np.uint8).view(dtype)[:, :rows]
    memory = np.full((rows, (columns + 9) * width), GUARD, np.uint8)
    transposer.transpose(panel, memory.view(dtype)[:, 4 : 4 + columns])
    bits = f"u{width}"
    assert np.array_equal(memory.view(bits)[:, 4 : 4 + columns], panel.view(bits).T)
    assert (memory[:, : 4 * width] == GUARD).all()
    assert (memory[:, (4 + columns) * width :] == GUARD).all()


@TRANSPOSERS
@pytest.mark.parametrize(("size", "step"), [(6, 6), (6, 10), (4096, 5000)])
def test_columns_are_read_from_where_they_lie(transposer: Transposer, size: int, step: int, tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 7 * step + size, np.uint8)
    (tmp_path / "file").write_bytes(bytes(3) + data.tobytes())
    columns = np.zeros((8, size), np.uint8)
    with (tmp_path / "file").open("rb") as file:
        transposer.read(file.fileno(), columns, 3, step)
        assert all(np.array_equal(column, data[k * step : k * step + size]) for k, column in enumerate(columns))
        with pytest.raises(EOFError):
            transposer.read(file.fileno(), columns, 4, step)


@TRANSPOSERS
def test_a_failing_read_is_an_error(transposer: Transposer, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            transposer.read(fd, np.zeros((2, 8), np.uint8), 0, 16)
    finally:
        os.close(fd)


def test_without_llvm_numpy_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    load_transposer.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert type(load_transposer()) is NumpyTransposer
    load_transposer.cache_clear()
