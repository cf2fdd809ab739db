"""One output file: a temporary that becomes the real file whole, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from .digest import HASH_CHUNK, HASH_STEP, Digest, hash_buffer
from .files import PAGE, advise, open_direct, read_exact, storage_errors, sync_folder, write_all, write_direct

FLUSH_BYTES = 2**19
PARTIAL_SUFFIX = ".partial"
_NO_PREALLOCATION = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def partial_path(folder: Path, name: str) -> Path:
    """Return a name for a temporary that no other run uses."""
    return folder / f"{name}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}"


class Piece(NamedTuple):
    """Some bytes of a file, and where they belong."""

    offset: int
    data: memoryview | bytes


_offset = itemgetter(0)


class PartialFile:
    """A file that does not exist under its name until `commit`."""

    def __init__(self, path: Path, target: Path, size: int, *, direct: bool = False) -> None:
        self.path = path
        self.target = target
        self.size = size
        self._written = WrittenPrefix()
        self._digest = Digest()
        self._large: deque[tuple[int, int]] = deque()
        self._hashing = threading.Lock()  # held by whoever is at the digest
        self._closing = threading.Lock()  # held by whoever closes the file, or works on it beside the workers
        self._direct = -1
        with storage_errors("create", target):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with storage_errors("reserve space for", target):
                _preallocate(self.fd, size)
            if direct:
                with storage_errors("open", target):
                    self._direct = open_direct(path)
        except BaseException:
            self.discard()
            raise

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write bytes at an offset; the digest takes them at once where it can."""
        self.store(data, offset, hashed=self.hash_at_hand(data, offset))

    def store(self, data: memoryview | bytes, offset: int, *, hashed: bool) -> None:
        """Write bytes at an offset: past the page cache if they are whole pages that the digest need not read back."""
        done = 0
        with storage_errors("write", self.target):
            if hashed and self._direct >= 0 and isinstance(data, memoryview) and not (offset | len(data)) % PAGE:
                done = write_direct(self._direct, data, offset)
            if done < len(data):
                write_all(self.fd, data[done:], offset + done)
                if len(data) - done >= FLUSH_BYTES:
                    self._large.append((offset + done, len(data) - done))
        self._written.add(offset, len(data))

    def write_pieces(self, pieces: Iterable[Piece]) -> None:
        """Write many pieces, neighbours together."""
        run: list[memoryview | bytes] = []
        begin = end = 0
        for piece in sorted(pieces, key=_offset):
            if run and piece.offset != end:
                self.write(b"".join(run), begin)
                run = []
            if not run:
                begin = end = piece.offset
            run.append(piece.data)
            end += len(piece.data)
        if run:
            self.write(b"".join(run), begin)

    def fill(self, fd: int) -> None:
        """Write what another open file holds; raises EOFError if it ends before `size` bytes."""
        buffer = hash_buffer(self.size)
        for start in range(0, self.size, HASH_CHUNK):
            part = buffer[: self.size - start]
            read_exact(fd, part, start)
            self.write(part, start)

    @property
    def unflushed(self) -> bool:
        """Whether there are large ranges that the kernel may keep to itself until the last sync."""
        return bool(self._large)

    def flush(self) -> None:
        """Let the kernel begin to write large ranges to disk; waits where the disk has much to do already."""
        with self._closing:
            while self._large and self.fd >= 0:
                advise(self.fd, *self._large.popleft(), "POSIX_FADV_DONTNEED")

    @property
    def unhashed(self) -> int:
        """How many bytes are written one behind the other that the digest has not seen."""
        return self._written.end - self._digest.end

    def hash_at_hand(self, data: memoryview | bytes, offset: int) -> bool:
        """Take into the digest what is about to be written, if it is its turn and nobody else is at it; return whether.

        What is in the processor's cache already need not be read back. A little that is missing before it is.
        """
        if not self._is_next(offset) or not self._hashing.acquire(blocking=False):
            return False
        try:
            if not self._is_next(offset):
                return False
            if self._digest.end < offset:
                self._read_back(offset, hash_buffer(offset - self._digest.end))
            self._digest.update(data)
            return True
        finally:
            self._hashing.release()

    def _is_next(self, offset: int) -> bool:
        """Return whether everything before is written, or at least hashed, and the digest is not far behind."""
        hashed = self._digest.end
        return hashed <= offset <= max(hashed, self._written.end) and offset - hashed <= HASH_STEP

    def hash_written(self, buffer: memoryview) -> None:
        """Take some of what is written into the digest, by way of the caller's buffer."""
        with self._hashing:
            self._read_back(min(self._written.end, self._digest.end + HASH_STEP), buffer)

    def _read_back(self, end: int, buffer: memoryview) -> None:
        """Take what is written up to `end` into the digest, by way of a buffer; then the disk may have it."""
        begin = self._digest.end
        with storage_errors("read back", self.target):
            self._digest.read(self.fd, end, buffer[:HASH_CHUNK])
        if end - begin >= FLUSH_BYTES:
            self._large.append((begin, end - begin))

    def forget(self) -> None:
        """Let the kernel drop what is durable from its cache."""
        advise(self.fd, 0, self.size, "POSIX_FADV_DONTNEED")

    def sha256(self, buffer: memoryview | None = None) -> str:
        """Return the SHA-256 of what was written, which must be all, hexadecimal; by way of the caller's buffer, if given."""
        if buffer is None:
            buffer = hash_buffer(self.size - self._digest.end)
        with self._hashing:
            self._read_back(self.size, buffer)
            return self._digest.hex()

    def sync(self) -> None:
        """Make the content durable; a failure is final, the temporary must be discarded."""
        with storage_errors("sync", self.target):
            os.fsync(self.fd)

    def commit(self) -> None:
        """Make the file durable under its name."""
        self.sync()
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

    def _close(self) -> None:
        with self._closing:
            fds, self.fd, self._direct = (self.fd, self._direct), -1, -1
            for fd in fds:
                if fd >= 0:
                    os.close(fd)


class WrittenPrefix:
    """Where the bytes of a file that are written one behind the other end, whatever the order of writing."""

    def __init__(self) -> None:
        self.end = 0
        self._ahead: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, offset: int, size: int) -> None:
        """Note a range; none may be written twice."""
        with self._lock:
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
