"""SHA-256 of texts, and of files, whole or piece by piece.

Called by `storage.partial_file`, whose digests follow the writes, and by whatever compares a file with its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import CancelledError

from .files import read_exact

HASH_CHUNK = 2**20  # bytes read at once
HASH_STEP = 8 * 2**20  # bytes hashed before somebody else gets a turn


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
