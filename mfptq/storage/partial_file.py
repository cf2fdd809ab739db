"""Write one output file: temporary, positional writes, SHA-256 on the way, fsync, rename.

Called by `output.shard_writer` (tiles, from any worker), `output.destination` (small files), `calibration.file` and
`execution.size_target`. Invariant: the name `target` appears only in `commit`, after fsync; every other exit removes the
temporary.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .digest import HASH_CHUNK, HASH_STEP, Digest, hash_buffer
from .files import advise, storage_errors, sync_folder, write_all

WRITE_BACK_BYTES = 2**19  # smaller ranges are left to the kernel: a call for each would cost more than it saves
FILL_BYTES = 2**22
_SENT_RANGES = 16
PARTIAL_SUFFIX = ".partial"
_NO_PREALLOCATION = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def partial_path(folder: Path, name: str) -> Path:
    """Return a name for a temporary that no other run uses."""
    return folder / f"{name.replace('/', '.')}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}"


class Piece(NamedTuple):
    """Some bytes of a file, and where they belong."""

    offset: int
    data: memoryview | bytes


class PartialFile:
    """A file that does not exist under its name until `commit`.

    Threads: `write` from any, for ranges that do not overlap; everything else from one, after the last write.
    `_hashing` guards the digest; whoever does not get it at once goes on without.
    """

    def __init__(self, path: Path, target: Path, size: int) -> None:
        self.path = path
        self.target = target
        self.size = size
        self._written = WrittenPrefix()
        self._digest = Digest()
        self._sent: deque[tuple[int, int]] = deque()
        self._hashing = threading.Lock()
        with storage_errors("create", target):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with storage_errors("reserve space for", target):
                _preallocate(self.fd, size)
        except BaseException:
            self.discard()
            raise

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write bytes at an offset, once. The digest takes them on the way if they come next in the file."""
        self._hash_at_hand(data, offset)
        with storage_errors("write", self.target):
            write_all(self.fd, data, offset)
        self._written.add(offset, len(data))
        self._write_back(offset, len(data))

    def fill(self, read_into: Callable[[int, memoryview], None]) -> None:
        """Write what `read_into(offset, buffer)` puts into a buffer, piece by piece, until the file is full."""
        buffer = memoryview(bytearray(min(self.size, FILL_BYTES)))
        for start in range(0, self.size, FILL_BYTES):
            part = buffer[: self.size - start]
            read_into(start, part)
            self.write(part, start)

    @property
    def unhashed(self) -> int:
        """How many bytes are written one behind the other that the digest has not seen."""
        return self._written.end - self._digest.end

    def hash_written(self, buffer: memoryview) -> None:
        """Let the digest catch up if it is more than HASH_STEP behind and no other thread is hashing.

        Bytes are read back from the page cache, by way of `buffer`.
        """
        while self.unhashed >= HASH_STEP and self._hashing.acquire(blocking=False):
            try:
                self._read_back(min(self._written.end, self._digest.end + HASH_STEP), buffer)
            finally:
                self._hashing.release()

    def sha256(self, buffer: memoryview | None = None) -> str:
        """Return the SHA-256 of the file, hexadecimal; every byte must be written. `buffer`: memory to read by way of."""
        assert self._written.end == self.size, f"{self._written.end} of {self.size} bytes were written"
        with self._hashing:
            self._read_back(self.size, hash_buffer(self.size - self._digest.end) if buffer is None else buffer)
            return self._digest.hex()

    def commit(self, *, forget: bool = False) -> None:
        """Make the file durable, then give it its name, durably. `forget`: drop it from the page cache.

        A failure is final: the temporary must be discarded.
        """
        with storage_errors("sync", self.target):
            os.fsync(self.fd)
        if forget:
            advise(self.fd, 0, self.size, "POSIX_FADV_DONTNEED")
        with storage_errors("rename to", self.target):
            self._close()
            os.replace(self.path, self.target)  # noqa: PTH105 - every system call goes through `os`
            sync_folder(self.target.parent)

    def discard(self) -> None:
        """Remove the temporary, if it is still one; a failure to do so never hides what led here."""
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            os.unlink(self.path)  # noqa: PTH108 - every system call goes through `os`

    def _hash_at_hand(self, data: memoryview | bytes, offset: int) -> None:
        """Hash `data` now, while it is in the CPU cache, if it comes next in the file and no other thread is hashing.

        A gap of at most HASH_STEP bytes before it is read back first. Without this, every byte would be read back once:
        18 % of a run on two cores.
        """
        if not self._is_next(offset) or not self._hashing.acquire(blocking=False):
            return
        try:
            if self._is_next(offset):
                self._read_back(offset, hash_buffer(offset - self._digest.end))
                self._digest.update(data)
        finally:
            self._hashing.release()

    def _is_next(self, offset: int) -> bool:
        """Return whether everything before `offset` is written, or at least hashed, and the digest is not far behind."""
        hashed = self._digest.end
        return hashed <= offset <= max(hashed, self._written.end) and offset - hashed <= HASH_STEP

    def _read_back(self, end: int, buffer: memoryview) -> None:
        begin = self._digest.end
        with storage_errors("read back", self.target):
            self._digest.read(self.fd, end, buffer[:HASH_CHUNK])
        self._write_back(begin, end - begin)

    def _write_back(self, offset: int, size: int) -> None:
        """Let the kernel begin to write a large range to disk, so that the last sync finds little to do.

        Measured in turn, without it: 10 % more time on two cores and five files, 14 % on one file, 18 % on 16 cores. Ranges that
        the digest has seen are given up once more when others have followed, and are clean by then: half of the system time
        where free memory is dear, no difference elsewhere. Others would come back from the disk: 60 % more time on 16 cores.
        """
        if size >= WRITE_BACK_BYTES:
            advise(self.fd, offset, size, "POSIX_FADV_DONTNEED")
            if offset + size <= self._digest.end:
                self._sent.append((offset, size))
            if len(self._sent) > _SENT_RANGES:  # the oldest is on the disk by now: its memory serves what comes next
                advise(self.fd, *self._sent.popleft(), "POSIX_FADV_DONTNEED")

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class WrittenPrefix:
    """Where the bytes of a file that are written one behind the other end, whatever the order of writing.

    Threads: `add` from any. `_lock` guards the ranges that lie ahead of `end`.
    """

    def __init__(self) -> None:
        self.end = 0
        self._ahead: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, offset: int, size: int) -> None:
        """Note a range; none may be written twice."""
        with self._lock:
            if size:
                self._ahead[offset] = offset + size
            while (end := self._ahead.pop(self.end, None)) is not None:
                self.end = end


def _preallocate(fd: int, size: int) -> None:
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _NO_PREALLOCATION:
                raise
    os.ftruncate(fd, size)
