"""A file's digest follows what is written, in whatever order that happens."""

from __future__ import annotations

import hashlib
import itertools
import random
from pathlib import Path

import pytest

from mfptq.partial import HASH_STEP, PartialFile, WrittenPrefix


def test_the_prefix_grows_only_over_what_is_written() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        edges = sorted({0, 1000, *(rng.randrange(1, 1000) for _ in range(20))})
        ranges = list(itertools.pairwise(edges))
        rng.shuffle(ranges)
        prefix, written = WrittenPrefix(), bytearray(1001)
        for begin, end in ranges:
            prefix.add(begin, end - begin)
            written[begin:end] = b"\1" * (end - begin)
            assert prefix.end == written.index(0)
        assert prefix.end == 1000


@pytest.mark.parametrize("seed", range(5))
def test_the_digest_is_that_of_the_whole_file(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(3 * HASH_STEP + 12345)
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", len(data))
    pieces = [(start, data[start : start + 2**20]) for start in range(0, len(data), 2**20)]
    rng.shuffle(pieces)
    for start, piece in pieces:
        file.write(piece, start)
        file.flush()
        if rng.random() < 0.5:
            file.hash_at_hand(piece, start)
        if file.unhashed and rng.random() < 0.5:
            before = file.unhashed
            file.hash_written(memoryview(bytearray(1000)))
            assert file.unhashed == max(0, before - HASH_STEP)
    assert file.sha256() == hashlib.sha256(data).hexdigest()
    file.commit()
    file.flush()  # a request that comes too late finds no file
    assert (tmp_path / "x").read_bytes() == data


def test_what_is_at_hand_is_hashed_only_in_its_turn(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", 4)
    for start, piece, unhashed in ((2, b"cd", 0), (0, b"ab", 2)):
        file.write(piece, start)
        file.hash_at_hand(piece, start)
        assert file.unhashed == unhashed
    file.hash_at_hand(b"cd", 2)
    assert file.unhashed == 0
    assert file.sha256() == hashlib.sha256(b"abcd").hexdigest()
    file.discard()


def test_what_is_still_to_be_written_is_never_hashed(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", 100)
    file.write(b"b" * 50, 50)
    assert file.unhashed == 0
    file.write(b"a" * 50, 0)
    assert file.unhashed == 100
    file.hash_written(memoryview(bytearray(1000)))
    assert file.sha256() == hashlib.sha256(b"a" * 50 + b"b" * 50).hexdigest()
    file.discard()
    assert not list(tmp_path.iterdir())
