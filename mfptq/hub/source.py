"""Read the files of a Hub repo by range, as `FolderSource` reads those of a folder; nothing is kept on disk.

Made by `opening.open_checkpoint`; called through `checkpoint.source.Source`. The commit is fixed: every request names it, and every file is compared with the listing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.reads import ByteRange, ReadAhead, ReadUnit
from ..checkpoint.source import FolderSource, Source
from ..errors import HubError, SourceError, quote
from .file_digests import FileDigests, HubFile, check_digest, new_digest
from .network_rate import measured_rate
from .ranges import RangeReader
from .window import Window


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files of a commit that are whole in the client's cache, and how to read them."""

    source: FolderSource | None = None
    names: frozenset[str] = frozenset()


class HubSource(Source):
    """The files of one repo at one commit; safe to use from several threads.

    What was announced by `read_ahead` is fetched once, by several connections, and held until it is dropped; any other read is
    a request of its own. Files that are in the client's cache already are read there.
    """

    is_remote = True

    def __init__(self, reader: RangeReader, listing: Mapping[str, HubFile], local: LocalFiles | None = None) -> None:
        self.reader = reader
        self._listing = listing
        self._local = local or LocalFiles()
        self._window: Window | None = None
        self._digests = FileDigests(listing)
        self._checked: set[str] = set()

    @property
    def checked_files(self) -> Collection[str]:
        """The files whose digest was compared with the listing's."""
        return self._checked

    @property
    def fetched_bytes(self) -> int:
        """How many bytes the Hub sent so far."""
        return self.reader.fetched

    def files(self) -> Mapping[str, int]:
        """Return every file's name and size."""
        return {name: file.size for name, file in self._listing.items()}

    def size(self, name: str) -> int:
        """Return a file's size in bytes."""
        return self._file(name).size

    def sha256(self, name: str) -> str | None:
        """Return what the listing says, which it does of large files."""
        return self._file(name).sha256

    def _file(self, name: str) -> HubFile:
        try:
            return self._listing[name]
        except KeyError:
            raise SourceError(f"file {quote(name)} is missing in {quote(self.reader.repo_id)}") from None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of a file; a file that is read whole is compared with its digest."""
        file, local = self._file(name), self._in_cache(name)
        if local is not None:
            local.read_into(name, offset, buffer)
            return
        done = 0
        while done < len(buffer):
            rest = buffer[done:]
            size = self._window.copy(name, offset + done, rest) if self._window is not None else 0
            if not size:
                size = len(rest) if self._window is None else self._window.gap(name, offset + done, len(rest))
                self.reader.read_into(file, offset + done, rest[:size])
                self._digests.take(name, offset + done, rest[:size])
            done += size
        if len(buffer) == file.size:
            digest = new_digest(file)
            digest.update(buffer)
            check_digest(file, digest)

    def _in_cache(self, name: str) -> FolderSource | None:
        return self._local.source if name in self._local.names else None

    @contextlib.contextmanager
    def reading(self, name: str, offset: int, size: int) -> Iterator[int | None]:
        """Lend the descriptor of a file in the cache; there is none of a remote file."""
        local = self._in_cache(name)
        if local is None:
            yield None
            return
        with local.reading(name, offset, size) as fd:
            yield fd

    def check_unchanged(self, name: str) -> None:
        """Check a file in the cache, and the digest of one that was fetched whole and in order.

        Of the others every answer was compared with the listing, and a commit never changes.
        """
        local = self._in_cache(name)
        if local is not None:
            local.check_unchanged(name)
            return
        if self._window is not None:
            self._window.hash_ready(name, wait=True)
        if self._digests.is_whole(name):
            self._checked.add(name)

    def drop_cached(self, name: str, offset: int, size: int) -> None:
        """Free the memory that holds a range."""
        if self._window is not None and name not in self._local.names:
            self._window.drop(name, offset, size)

    def read_ahead(self, ahead: ReadAhead) -> None:
        """Begin to fetch what will be read."""
        if self._window is not None:
            self._window.close()
        digests = self._digests if ahead.digests else None
        self._window = Window(self._fetch, ReadAhead(self._remote(ahead.order), ahead.budget), digests)

    def _remote(self, order: Iterator[tuple[str, Sequence[ReadUnit]]]) -> Iterator[tuple[str, Sequence[ReadUnit]]]:
        """Yield what is announced, without the files that are in the cache."""
        for name, units in order:
            kept = [tuple(each for each in unit.ranges if each.name not in self._local.names) for unit in units]
            yield name, [ReadUnit(ranges) for ranges in kept if ranges]

    def _fetch(self, place: ByteRange, buffer: memoryview, note: Callable[[int], None]) -> None:
        self.reader.read_into(self._file(place.name), place.start, buffer, note)

    def rate(self) -> float | None:
        """Return how many bytes a second the largest file comes at, over as many connections as a run has."""
        remote = [file for name, file in self._listing.items() if name not in self._local.names and file.size]
        return measured_rate(self.reader, max(remote, key=lambda file: file.size)) if remote else None

    def stop(self) -> None:
        """Let every read that waits fail soon."""
        self.reader.stop()
        if self._window is not None:
            self._window.stop(HubError("the run was stopped"))

    def close(self) -> None:
        """End all fetching and free the memory."""
        self.reader.stop()
        if self._window is not None:
            self._window.close()
            self._window = None
        if self._local.source is not None:
            self._local.source.close()
