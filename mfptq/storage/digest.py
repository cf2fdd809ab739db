"""SHA-256 of texts and of files: one that follows the writes, and many files in parallel."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from typing import TypeVar

from .files import read_exact

HASH_CHUNK = 2**20  # bytes read at once
HASH_STEP = 8 * 2**20  # bytes hashed before somebody else gets a turn
Item = TypeVar("Item")
Result = TypeVar("Result")
Stopped = Callable[[], bool]
_MOST_AT_ONCE = 16
_POLL_SECONDS = 0.1


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(
    function: Callable[[Stopped, Item], Result], items: Iterable[Item], poll: Callable[[], object] | None = None
) -> list[Result]:
    """Return what a function makes of each item, in their order, from as many threads as there are cores.

    `poll` is called in this thread about every tenth of a second. What it raises, the first error, and an interruption stop
    everything: `function` asks its first argument now and then whether that has happened, and then raises whatever it likes.
    """
    stopped = threading.Event()
    pool = ThreadPoolExecutor(min(available_cores(), _MOST_AT_ONCE))
    try:
        futures = [pool.submit(function, stopped.is_set, item) for item in items]
        left = set(futures)
        while left:
            done, left = wait(left, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if poll is not None:
                poll()
        return [future.result() for future in futures]
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def text_sha256(text: str) -> str:
    """Return the SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(
    fd: int, size: int, stopped: Callable[[], bool] | None = None, note: Callable[[int], object] | None = None
) -> str:
    """Return the SHA-256 of the first `size` bytes of an open file, hexadecimal; raises EOFError if it ends before.

    Raises CancelledError soon after `stopped` says so. `note` is told how many more bytes are done.
    """
    digest, buffer = Digest(), hash_buffer(size)
    while digest.end < size:
        if stopped is not None and stopped():
            raise CancelledError
        begin = digest.end
        digest.read(fd, min(size, begin + HASH_STEP), buffer)
        if note is not None:
            note(digest.end - begin)
    return digest.hex()


def hash_buffer(size: int) -> memoryview:
    """Return memory to hash a file of `size` bytes by way of."""
    return memoryview(bytearray(min(size, HASH_CHUNK)))


class Digest:
    """The SHA-256 of a file's first bytes: `end` of them so far."""

    def __init__(self) -> None:
        self.end = 0
        self._state = hashlib.sha256()

    def read(self, fd: int, end: int, buffer: memoryview) -> None:
        """Take in an open file's bytes up to `end`; raises EOFError if it ends before."""
        while self.end < end:
            part = buffer[: end - self.end]
            read_exact(fd, part, self.end)
            self.update(part)

    def update(self, data: memoryview | bytes) -> None:
        """Take in the bytes that come next."""
        self._state.update(data)
        self.end += len(data)

    def hex(self) -> str:
        """Return the digest, hexadecimal."""
        return self._state.hexdigest()
