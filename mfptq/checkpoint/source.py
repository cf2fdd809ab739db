"""Read the files of a checkpoint by name and range: the interface, and its form for a folder.

Whatever reads a checkpoint calls a `Source`, wherever the files are: `hub.source` has the form for the Hub. Nothing here writes.
"""

from __future__ import annotations

import contextlib
import os
import stat
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import ClassVar

from ..errors import SourceChangedError, SourceError, StorageError, UnsafePathError, quote
from ..limits import MAX_FILES
from ..storage.files import advise, confined, followed, open_regular, read_exact
from .reads import ReadAhead

MAX_OPEN_FILES = 128


class Source(ABC):
    """The files of one checkpoint. Methods may be called from several threads, `close` once all of them have returned.

    Methods that are not abstract are right for files that are here; a source that reads over a network has its own.

    Names are relative, with `/` between folders; offsets and sizes are in bytes. Reads raise SourceError, StorageError or
    HubError, and SourceChangedError where a file is no longer what it was when it was first looked at. `is_remote`: reads go
    over a network, and what is read is held in this process until it is dropped.
    """

    is_remote: ClassVar[bool] = False

    @property
    def fetched_bytes(self) -> int:
        """How many bytes came over a network so far."""
        return 0

    @property
    def checked_files(self) -> Collection[str]:
        """The files that `check_unchanged` found to be whole, and compared with the digest that `sha256` names."""
        return ()

    @abstractmethod
    def files(self) -> Mapping[str, int]:
        """Return every file's name and size, in name order; files and folders whose names begin with a dot are left out."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return a file's size."""

    def sha256(self, _name: str, /) -> str | None:
        """Return the SHA-256 that whoever stores a file says it has, hexadecimal; None where nobody does."""
        return None

    @abstractmethod
    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on."""

    @abstractmethod
    def reading(self, name: str, offset: int, size: int) -> contextlib.AbstractContextManager[int | None]:
        """Lend a descriptor to read a range by; None where the files are not local and `read_into` must do."""

    @abstractmethod
    def check_unchanged(self, name: str) -> None:
        """Raise SourceChangedError if a file is no longer what it was when it was first looked at.

        Of a remote file that was read whole and in order, the digest is compared.
        """

    @abstractmethod
    def drop_cached(self, name: str, offset: int, size: int) -> None:
        """Note that a range will not be read again."""

    def read_ahead(self, ahead: ReadAhead) -> None:  # noqa: B027 - the kernel reads ahead of local reads by itself
        """Take note of what will be read, in about which order, and how much memory may hold it until it is dropped."""

    def rate(self) -> float | None:
        """Return how many bytes a second come over the network, measured for a moment; None where there is none."""
        return None

    def stop(self) -> None:  # noqa: B027 - local reads do not wait long
        """Let every read that waits for a network fail soon: the run is being ended."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files, connections and memory."""


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


class FolderSource(Source):
    """The files of one folder, read by name and range; safe to use from several threads.

    A file that is replaced or resized after it was first opened is an error, not other data. Links that lead out of the
    folder are errors too, but with `follow_links`: that is for folders whose links one has made oneself.
    """

    def __init__(self, root: Path, *, follow_links: bool = False) -> None:
        self.root = root
        self._follow_links = follow_links
        self._open: OrderedDict[str, int] = OrderedDict()
        self._users: dict[str, int] = {}
        self._stamps: dict[str, FileStamp] = {}
        self._lock = Lock()

    def files(self) -> Mapping[str, int]:
        """Return every file's name and size; links to folders are not followed, broken links have size 0."""
        found: dict[str, int] = {}
        for entry in _walk(self.root, ""):
            found[entry[0]] = entry[1]
            if len(found) > MAX_FILES:
                raise SourceError(f"folder {quote(self.root)} holds more than {MAX_FILES} files: is it the right one?")
        return dict(sorted(found.items()))

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
        fd = open_regular(self._path(name))
        stamp = FileStamp.of(fd)
        if self._stamps.setdefault(name, stamp) != stamp:
            os.close(fd)
            raise SourceChangedError(f"{quote(name)} was replaced while it was being converted: start again")
        return fd

    def _path(self, name: str) -> Path:
        if self._follow_links:
            return followed(self.root, name)
        try:
            return confined(self.root, name)
        except UnsafePathError as error:
            raise UnsafePathError(f"{error}: follow_links reads it all the same, if you trust it") from None

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


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except NotADirectoryError:
        raise SourceError(f"{quote(folder)} is a file, expected a folder in Hugging Face layout") from None
    except OSError as error:
        raise SourceError(f"cannot read folder {quote(folder)}: {error.strerror}") from None
    for entry in found:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/")
            continue
        try:
            status = entry.stat()
        except OSError:  # a link that leads nowhere, or in a circle: what needs it will say so
            yield f"{prefix}{entry.name}", 0
            continue
        if not stat.S_ISDIR(status.st_mode):
            yield f"{prefix}{entry.name}", status.st_size if stat.S_ISREG(status.st_mode) else 0
