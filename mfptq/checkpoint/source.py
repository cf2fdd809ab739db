"""Read the files of one folder by name and range.

Everything that reads a checkpoint goes through a source; nothing here writes."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from ..errors import SourceChangedError, StorageError, quote
from ..storage.files import advise, confined, open_regular, read_exact

MAX_OPEN_FILES = 128


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells one state of a file from another without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, fd: int) -> FileStamp:
        """Return the stamp of an open file."""
        status = os.fstat(fd)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class FolderSource:
    """The files of one folder, read by name and range; safe to use from several threads.

    A file that is replaced or resized after it was first opened is an error, not other data.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: OrderedDict[str, int] = OrderedDict()
        self._users: dict[str, int] = {}
        self._stamps: dict[str, FileStamp] = {}
        self._lock = Lock()

    def size(self, name: str) -> int:
        """Return a file's size in bytes."""
        return self.stamp(name).size

    def stamp(self, name: str) -> FileStamp:
        """Return the state of a file when it was first opened."""
        if name not in self._stamps:
            with self.descriptor(name):
                pass
        return self._stamps[name]

    @contextlib.contextmanager
    def descriptor(self, name: str) -> Iterator[int]:
        """Lend the file's descriptor, for copies inside the kernel; it must not be closed."""
        with self._lock:
            fd = self._open.pop(name, None)
            if fd is None:
                fd = self._open_checked(name)
            self._open[name] = fd
            self._users[name] = self._users.get(name, 0) + 1
        try:
            yield fd
        finally:
            with self._lock:
                self._users[name] -= 1
                self._close_idle(MAX_OPEN_FILES)

    def _open_checked(self, name: str) -> int:
        fd = open_regular(confined(self.root, name))
        stamp = FileStamp.of(fd)
        if self._stamps.setdefault(name, stamp) != stamp:
            os.close(fd)
            raise SourceChangedError(f"{quote(name)} was replaced while it was being converted: start again")
        return fd

    def _close_idle(self, keep: int) -> None:
        for name in [name for name in self._open if not self._users[name]][: max(0, len(self._open) - keep)]:
            os.close(self._open.pop(name))

    @contextlib.contextmanager
    def reading(self, name: str, offset: int, size: int) -> Iterator[int]:
        """Lend the file's descriptor to read `size` bytes from `offset`, and say what was wrong where that fails."""
        with self.descriptor(name) as fd:
            try:
                yield fd
            except EOFError:
                raise SourceChangedError(f"{quote(name)} ended before byte {offset + size}: truncated?") from None
            except OSError as error:
                raise StorageError(f"read byte {offset} of", name, error) from None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the file."""
        with self.reading(name, offset, len(buffer)) as fd:
            read_exact(fd, buffer, offset)

    def check_unchanged(self, name: str) -> None:
        """Raise SourceChangedError if the file is no longer what it was when it was first opened."""
        with self.descriptor(name) as fd:
            if FileStamp.of(fd) != self._stamps[name]:
                raise SourceChangedError(f"{quote(name)} changed while it was being converted: start again")

    def drop_cached(self, name: str, offset: int, size: int) -> None:
        """Tell the kernel that a range will not be read again."""
        with self.descriptor(name) as fd:
            advise(fd, offset, size, "POSIX_FADV_DONTNEED")

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            self._users = dict.fromkeys(self._users, 0)
            self._close_idle(0)
