"""A file's digest follows what is written, in whatever order that happens."""

from __future__ import annotations

import errno
import hashlib
import itertools
import mmap
import os
import random
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from mfptq.errors import StorageError
from mfptq.storage import files
from mfptq.storage import partial_file as partial
from mfptq.storage.digest import HASH_STEP, file_sha256
from mfptq.storage.files import PAGE
from mfptq.storage.partial_file import PartialFile, WrittenPrefix


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
        if rng.random() < 0.5:
            file.write(piece, start)
        else:
            file.store(piece, start, hashed=False)
        file.flush()
        if file.unhashed and rng.random() < 0.5:
            before = file.unhashed
            file.hash_written(memoryview(bytearray(1000)))
            assert file.unhashed == max(0, before - HASH_STEP)
    assert file.sha256() == hashlib.sha256(data).hexdigest()
    file.commit()
    file.flush()  # a request that comes too late finds no file
    assert (tmp_path / "x").read_bytes() == data


def test_what_is_at_hand_is_hashed_only_in_its_turn(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", 6)
    assert not file.hash_at_hand(b"cd", 2)
    file.write(b"cd", 2)
    assert file.unhashed == 0
    file.write(b"ab", 0)
    assert file.unhashed == 2
    assert file.hash_at_hand(b"ef", 4), "what is missing before it is written, and little"
    file.store(b"ef", 4, hashed=True)
    assert file.unhashed == 0
    assert file.sha256() == hashlib.sha256(b"abcdef").hexdigest()
    file.discard()


def test_what_is_at_hand_may_follow_what_is_not_written_yet_but_hashed(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", 4)
    assert file.hash_at_hand(b"ab", 0)
    assert file.hash_at_hand(b"cd", 2)
    file.store(b"cd", 2, hashed=True)
    file.hash_written(memoryview(bytearray(1000)))
    file.store(b"ab", 0, hashed=True)
    assert file.sha256() == hashlib.sha256(b"abcd").hexdigest()
    file.commit()
    assert (tmp_path / "x").read_bytes() == b"abcd"


def test_the_digest_does_not_wait_for_much_that_is_missing(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(HASH_STEP + 2)
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", len(data))
    file.store(data[: HASH_STEP + 1], 0, hashed=False)
    assert not file.hash_at_hand(data[-1:], HASH_STEP + 1)
    file.store(data[-1:], HASH_STEP + 1, hashed=False)
    assert file.sha256() == hashlib.sha256(data).hexdigest()
    file.discard()


def test_what_is_still_to_be_written_is_never_hashed(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", 100)
    file.store(b"b" * 50, 50, hashed=False)
    assert file.unhashed == 0
    file.store(b"a" * 50, 0, hashed=False)
    assert file.unhashed == 100
    file.hash_written(memoryview(bytearray(1000)))
    assert file.sha256() == hashlib.sha256(b"a" * 50 + b"b" * 50).hexdigest()
    file.discard()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the sizes of the writes that go past the page cache, on a file system that has none too."""
    written: list[int] = []

    def counted(fd: int, buffer: memoryview, offset: int) -> int:
        written.append(files.write_direct(fd, buffer, offset))
        return written[-1]

    monkeypatch.setattr(partial, "write_direct", counted)
    return written


def _pages(data: bytes) -> memoryview:
    """Return a copy of some bytes that begins at a page."""
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memoryview(memory)


def _supports_direct(folder: Path) -> bool:
    (folder / "probe").touch()
    fd = files.open_direct(folder / "probe")
    os.close(fd) if fd >= 0 else None
    return fd >= 0


@pytest.mark.parametrize("seed", range(5))
def test_whole_pages_that_are_hashed_go_past_the_page_cache(tmp_path: Path, seed: int, direct: list[int]) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(300 * PAGE + 123)
    edges = sorted({0, len(data), *(rng.randrange(300) * PAGE + rng.choice((0, 0, 0, 8)) for _ in range(40))})
    ranges = list(itertools.pairwise(edges))
    if seed:  # from the beginning on, or with neighbours exchanged
        for place in rng.sample(range(len(ranges) - 1), 10):
            ranges[place], ranges[place + 1] = ranges[place + 1], ranges[place]
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", len(data), direct=True)
    for begin, end in ranges:
        file.write(_pages(data[begin:end]), begin)
    assert file.sha256() == hashlib.sha256(data).hexdigest()
    file.commit()
    assert (tmp_path / "x").read_bytes() == data
    if _supports_direct(tmp_path):
        whole = [end - begin for begin, end in ranges if begin % PAGE == 0 and end % PAGE == 0]
        assert all(size % PAGE == 0 for size in direct)
        assert direct == whole if not seed else 0 < sum(direct) <= sum(whole)


@pytest.mark.parametrize("refused", ["at once", "later", "by half", "when opened"])
def test_a_file_system_may_refuse_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    real, calls = os.pwrite, []

    def pwrite(fd: int, buffer: memoryview, offset: int) -> int:
        if fd == file._direct:
            calls.append(fd)
            if refused == "by half":
                return real(fd, buffer[: len(buffer) // 2 // PAGE * PAGE], offset) if len(buffer) > PAGE else 0
            if refused == "at once" or len(calls) > 2:
                raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffer, offset)

    if refused == "when opened":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    data = random.Random(1).randbytes(20 * PAGE)
    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", len(data), direct=True)
    monkeypatch.setattr(os, "pwrite", pwrite)
    for begin in range(0, len(data), 4 * PAGE):
        file.write(_pages(data[begin : begin + 4 * PAGE]), begin)
    assert bool(calls) == (refused != "when opened" and _supports_direct(tmp_path))
    assert file.sha256() == hashlib.sha256(data).hexdigest()
    file.commit()
    assert (tmp_path / "x").read_bytes() == data


def test_a_direct_write_that_fails_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _buffer: memoryview, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = PartialFile(tmp_path / "x.partial", tmp_path / "x", PAGE, direct=True)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left"):
        file.write(_pages(bytes(PAGE)), 0)
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
