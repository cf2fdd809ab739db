"""A file's digest follows what is written, in whatever order that happens."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from mfptq.errors import StorageError
from mfptq.storage.digest import HASH_STEP, file_sha256
from mfptq.storage.partial_file import PartialFile, WrittenPrefix
from tests.conftest import sampled


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


def busy(file: PartialFile) -> bool:
    """Keep the digest busy, as another thread that hashes does."""
    return file._hashing.acquire()


@pytest.mark.parametrize("seed", sampled(range(2), range(2, 5)))
def test_the_digest_is_that_of_the_whole_file(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(3 * HASH_STEP + 12345)
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", len(data))
    pieces = [(start, data[start : start + 2**20]) for start in range(0, len(data), 2**20)]
    rng.shuffle(pieces)
    for start, piece in pieces:
        hindered = rng.random() < 0.5 and busy(file)
        file.write(piece, start)
        if hindered:
            file._hashing.release()
        file.hash_written(memoryview(bytearray(1000)))
        assert file.unhashed < HASH_STEP
    assert file.sha256() == hashlib.sha256(data).hexdigest()
    file.commit()
    assert (tmp_path / "x").read_bytes() == data


def test_what_is_at_hand_is_hashed_only_in_its_turn(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", 6)
    file.write(b"cd", 2)
    assert file.unhashed == 0
    file.write(b"ab", 0)
    assert file.unhashed == 2
    file.write(b"ef", 4)  # what is missing before it is written, and little
    assert file.unhashed == 0
    assert file.sha256() == hashlib.sha256(b"abcdef").hexdigest()
    file.discard()


def test_the_digest_does_not_wait_for_much_that_is_missing(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(HASH_STEP + 2)
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", len(data))
    busy(file)
    file.write(data[: HASH_STEP + 1], 0)
    file._hashing.release()
    file.write(data[-1:], HASH_STEP + 1)
    assert file.unhashed == HASH_STEP + 2
    assert file.sha256() == hashlib.sha256(data).hexdigest()
    file.discard()


def test_what_is_still_to_be_written_is_never_hashed(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", 100)
    file.write(b"b" * 50, 50)
    assert file.unhashed == 0
    with pytest.raises(AssertionError, match="0 of 100 bytes"):
        file.sha256()
    file.write(b"a" * 50, 0)
    assert file.sha256() == hashlib.sha256(b"a" * 50 + b"b" * 50).hexdigest()
    file.discard()
    assert not list(tmp_path.iterdir())


def test_pieces_are_written_where_they_belong_whatever_their_order(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "temporary", tmp_path / "file", 20)
    for offset, data in [(10, b"cd"), (0, b"ab"), (12, memoryview(b"efg")), (19, b"z"), (2, b"--"), (5, b"")]:
        file.write(data, offset)
    file.commit()
    assert (tmp_path / "file").read_bytes() == b"ab--\0\0\0\0\0\0cdefg\0\0\0\0z"
    assert not (tmp_path / "temporary").exists()


def test_a_write_that_fails_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _buffer: memoryview, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", 5)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left"):
        file.write(bytes(5), 0)
    file.discard()
    assert not list(tmp_path.iterdir())


def test_a_digest_of_a_large_file_can_be_stopped(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(2 * HASH_STEP + 5)
    (tmp_path / "file").write_bytes(content)
    asked = []
    with (tmp_path / "file").open("rb") as file:
        assert file_sha256(file.fileno(), len(content)) == hashlib.sha256(content).hexdigest()
        assert file_sha256(file.fileno(), 7, lambda: False) == hashlib.sha256(content[:7]).hexdigest()
        with pytest.raises(CancelledError):
            file_sha256(file.fileno(), len(content), lambda: asked.append(1) or len(asked) > 1)
        with pytest.raises(EOFError):
            file_sha256(file.fileno(), len(content) + 1)
    assert len(asked) == 2
