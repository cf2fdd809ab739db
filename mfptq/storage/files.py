"""Read and write files by position, and keep names within their folder; every other system call on data is beside this module.

Nothing is memory-mapped: a mapped file that shrinks kills the process, a short `pread` is an error one can report.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

from ..errors import MfptqError, SourceError, StorageError, UnsafePathError, quote
from ..limits import MAX_FILE_NAME_BYTES

_PASSING = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}  # not the file's fault


def expanded(path: str | Path) -> Path:
    """Return a path that a user gave with `~` at its beginning expanded: option=~/x reaches a program as it stands."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises where there is no home


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


def relative_name(name: str) -> str:
    """Return `name` if it is harmless names joined by `/`, in UTF-8, or raise UnsafePathError."""
    for part in name.split("/"):
        plain_name(part)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UnsafePathError(f"file name {quote(name)} is not valid Unicode: rename it") from None
    return name


def followed(root: Path, name: str) -> Path:
    """Return the real path of `root/name`, wherever its links lead."""
    return Path(os.path.realpath(root / relative_name(name)))


def confined(root: Path, name: str) -> Path:
    """Return the real path of `root/name`, which may be a symlink inside `root` or into its Hub cache's blobs only."""
    real = followed(root, name)
    base = Path(os.path.realpath(root))
    allowed = [base]
    if base.parent.name == "snapshots":
        allowed.append(base.parent.parent / "blobs")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise UnsafePathError(f"{quote(name)} is a link that leads out of {quote(root)}")
    return real


def beneath(root: Path, name: str) -> Path:
    """Return `root/name` without following a last link; its folder may be no link that leads out of `root`."""
    parent, _, leaf = relative_name(name).rpartition("/")
    return (confined(root, parent) if parent else root) / leaf


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


def read_strided(fd: int, rows: memoryview, offset: int, step: int) -> None:
    """Fill each row of `rows`, bytes `[n, size]`, from `offset` on, `step` bytes apart; raises as `read_exact`."""
    size = rows.shape[1] if rows.shape else 0
    flat = rows.cast("B")
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        if os.preadv(fd, [part], offset) != size:
            read_exact(fd, part, offset)
        offset += step


def replace_text(path: Path, text: str) -> None:
    """Write a small file in one step: whoever reads it finds the old text or the new. A power cut may lose the new one."""
    made = path.with_name(f".{path.name}.new")
    with storage_errors("write", path):
        made.write_text(text, encoding="utf-8")
        made.replace(path)


def write_all(fd: int, buffer: memoryview | bytes, offset: int) -> None:
    """Write all of `buffer` at `offset`, however many calls it takes."""
    view = memoryview(buffer).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


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
