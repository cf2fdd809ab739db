"""Checksums: the same however a tensor is cut, and another for every change that is made to it."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from mfptq.storage.checksum import MODULUS, RUN_WORDS, checksum, checksum_of_columns


def tensor(dtype: str = "u2", size: int = 50_000) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size * np.dtype(dtype).itemsize, dtype=np.uint8).view(dtype)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_in_any_order_make_the_same(seed: int) -> None:
    rng = random.Random(seed)
    values = tensor(rng.choice(["u1", "u2", "f4"]), rng.choice([1, 7, 16, 1000, RUN_WORDS * 4, 50_000]))
    cuts = sorted({0, len(values), *(rng.randrange(len(values) + 1) for _ in range(rng.randrange(12)))})
    pieces = list(itertools.pairwise(cuts))
    rng.shuffle(pieces)
    width = values.itemsize
    total = sum(checksum("a", begin * width, values[begin:end]) for begin, end in pieces) % MODULUS
    assert total == checksum("a", 0, values)


@pytest.mark.parametrize("dtype", ["u2", "f4"])
@pytest.mark.parametrize(
    ("rows", "columns"), [(50, 5120), (37, 80), (9, 4 * RUN_WORDS), (7, 20_000), (100, 2880), (300, 16)]
)
def test_so_do_columns_of_several_rows(rows: int, columns: int, dtype: str) -> None:
    matrix = tensor(dtype, rows * columns).reshape(rows, columns)
    width, above = matrix.itemsize, rows // 3
    total = checksum("a", 0, matrix[:above])
    for begin, end in itertools.pairwise(sorted({0, 16, columns // 32 * 16, columns})):
        part = np.ascontiguousarray(matrix[above:, begin:end])
        total += checksum_of_columns("a", (above * columns + begin) * width, part, columns * width)
    assert total % MODULUS == checksum("a", 0, matrix)


def test_outputs_hold_it_so_it_stays_what_it_is() -> None:
    assert checksum("model.layers.0.mlp.up_proj", 0, np.arange(40_000, dtype=np.uint16)) == 0x71B1D1AC0FC61718


@pytest.mark.parametrize("bit", range(0, 16, 5))
def test_any_single_bit_counts(bit: int) -> None:
    values = tensor()
    for place in (0, 1, 2, 3, 4 * RUN_WORDS, 49_999):
        changed = values.copy()
        changed[place] ^= 1 << bit
        assert checksum("a", 0, changed) != checksum("a", 0, values)


def test_places_count_and_so_do_names() -> None:
    values = tensor(size=64 * 512)
    rows = values.reshape(64, 512)
    assert checksum("a", 0, np.ascontiguousarray(rows[::-1])) != checksum("a", 0, rows)
    runs = values.reshape(-1, 4 * RUN_WORDS)  # words of equal factors but for that of the run
    assert checksum("a", 0, np.ascontiguousarray(runs[::-1])) != checksum("a", 0, runs)
    one, two = rows[:32].copy(), rows[32:].copy()
    exchanged = (checksum("a", 0, two) + checksum("b", 0, one)) % MODULUS
    assert exchanged != (checksum("a", 0, one) + checksum("b", 0, two)) % MODULUS
