"""Compute the digests of remote files from their bytes as they arrive, as long as these arrive in order.

Called by `source` and `window`, from several threads. A file whose bytes leave a gap is left unchecked, never guessed.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import SourceChangedError, quote


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file in a repo's listing: `sha256` only of large files, `oid` the Git object of the others, hexadecimal."""

    name: str
    size: int
    oid: str
    sha256: str | None = None

    @property
    def etag(self) -> str:
        """What the Hub calls this content."""
        return self.sha256 or self.oid


@dataclass(slots=True)
class _Progress:
    """The digest of a file's first `end` bytes; `lock` is held while some are taken in."""

    state: Any
    end: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class FileDigests:
    """The digests of files by name, each of what was taken of it so far; safe to use from several threads."""

    def __init__(self, files: Mapping[str, HubFile]) -> None:
        self._files = files
        self._progress: dict[str, _Progress] = {}
        self._lock = threading.Lock()  # guards the table of digests

    def end(self, name: str) -> int:
        """Return how many bytes of a file were taken: where the bytes that come next begin."""
        return self._of(name).end

    def take(self, name: str, offset: int, data: memoryview) -> int:
        """Take what is new of some bytes of a file, if they leave no gap; return how many bytes are taken by now."""
        progress = self._of(name)
        with progress.lock:
            if offset <= progress.end < offset + len(data):
                progress.state.update(data[progress.end - offset :])
                progress.end = offset + len(data)
            return progress.end

    def is_whole(self, name: str) -> bool:
        """Return whether every byte of a file was taken; raises SourceChangedError if the Hub names another digest."""
        file, progress = self._files[name], self._of(name)
        with progress.lock:
            if progress.end < file.size:
                return False
            check_digest(file, progress.state)
        return True

    def _of(self, name: str) -> _Progress:
        with self._lock:
            if name not in self._progress:
                self._progress[name] = _Progress(new_digest(self._files[name]))
            return self._progress[name]


def check_digest(file: HubFile, digest: Any) -> None:
    """Raise SourceChangedError unless the digest of a whole file is the one that the Hub names."""
    if digest.hexdigest() != file.etag:
        raise SourceChangedError(f"{quote(file.name)} is not what its digest on the Hub says: try again")


def new_digest(file: HubFile) -> Any:
    """Return the digest that the Hub has of a file, before its first byte."""
    if file.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)  # a Git object begins with its kind and length
