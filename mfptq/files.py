"""Every system call that touches data: positional reads and writes, atomic files, path confinement.

Nothing is memory-mapped: a mapped file that shrinks kills the process, a short `pread` is an error one can report.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from threading import Lock

from .errors import MfptqError, SourceChangedError, SourceError, StorageError, UnsafePathError, quote
from .limits import MAX_FILE_NAME_BYTES

MAX_OPEN_FILES = 128
PAGE = 4096  # what direct writes begin and end at, whatever the disk
_NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP}
_PASSING = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}  # not the file's fault


def plain_name(name: str) -> str:
    """Return `name` if it is one harmless component of a path on any system, or raise UnsafePathError."""
    unsafe = (
        name in ("", ".", "..")
        or name != PureWindowsPath(name).name
        or "/" in name
        or any(ord(char) < 32 or char in '?#:*"<>|' for char in name)
        or len(name.encode(errors="surrogatepass")) > MAX_FILE_NAME_BYTES
    )
    if unsafe:
        raise UnsafePathError(f"file name {quote(name)} is not a plain name in this folder")
    return name


def confined(root: Path, name: str) -> Path:
    """Return the real path of `root/name`, which may be a symlink inside `root` or into its Hub cache's blobs only."""
    real = Path(os.path.realpath(root / plain_name(name)))
    base = Path(os.path.realpath(root))
    allowed = [base]
    if base.parent.name == "snapshots":
        allowed.append(base.parent.parent / "blobs")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise UnsafePathError(f"{quote(name)} is a link that leads out of {quote(root)}")
    return real


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


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor; never blocks on a pipe or follows a last link."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise SourceError(f"file {quote(path)} is missing") from None
    except OSError as error:
        if error.errno in _PASSING:
            raise StorageError("open", path, error) from None
        raise SourceError(f"cannot open {quote(path)}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SourceError(f"{quote(path)} is not a regular file")
    return fd


def read_exact(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with the bytes at `offset`, or raise EOFError if the file ends before, OSError if it fails."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise EOFError
        done += count


def write_all(fd: int, buffer: memoryview | bytes, offset: int) -> None:
    """Write all of `buffer` at `offset`, however many calls it takes."""
    view = memoryview(buffer).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def open_direct(path: Path) -> int:
    """Open a file for writes that go past the page cache; -1 where the system or the file system has none.

    Such a write begins at a multiple of PAGE, in the file and in memory, and is whole pages long.
    """
    if not hasattr(os, "O_DIRECT"):
        return -1
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _NOT_DIRECT:
            raise
        return -1


def write_direct(fd: int, buffer: memoryview, offset: int) -> int:
    """Write whole pages past the page cache; return how many bytes were written, none where that is refused."""
    try:
        return os.pwrite(fd, buffer, offset)
    except OSError as error:
        if error.errno not in _NOT_DIRECT:
            raise
        return 0


def read_small(path: Path, limit: int) -> bytes:
    """Return a regular file's bytes; refuses, before reading, a file of more than `limit` bytes."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise SourceError(f"{quote(path)} is {size} bytes, expected at most {limit}")
        data = bytearray(size)
        read_exact(fd, memoryview(data), 0)
        return bytes(data)
    except EOFError:
        raise SourceError(f"cannot read {quote(path)}: it ended early") from None
    except OSError as error:
        raise StorageError("read", path, error) from None
    finally:
        os.close(fd)


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


def advise(fd: int, offset: int, size: int, advice: str) -> None:
    """Give the kernel a hint about a range, where it takes any."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, getattr(os, advice))


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable; a file system that cannot sync folders (EINVAL) is left to itself."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def storage_errors(action: str, path: object) -> Iterator[None]:
    """Turn the system's errors inside the block into StorageError, saying what was being done to which file."""
    try:
        yield
    except MfptqError:
        raise
    except OSError as error:
        raise StorageError(action, path, error) from error
