"""Compare the parts of an output with their source on all cores, fetched ahead where the source is remote.

Called by `verification`. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from functools import partial
from itertools import groupby
from operator import attrgetter
from threading import Lock

from ..checkpoint.reads import SEGMENT_BYTES, ByteRange, ReadAhead, ReadUnit
from ..checkpoint.source import Source
from ..execution.events import Advanced, OnEvent, Planned
from ..storage.parallel import Stopped, in_parallel
from .stored_weights import Comparison, Part

HELD_BYTES = 256 * 2**20  # of a remote source, at most


class Tally:
    """A count that becomes events. Threads: `add` from any; `begin` and `poll` from the one that `on_event` belongs to."""

    def __init__(self, on_event: OnEvent | None) -> None:
        self._on_event = on_event
        self._bytes = 0
        self._lock = Lock()

    def begin(self, total_bytes: int) -> None:
        """Say how much there is to do."""
        if self._on_event is not None:
            self._on_event(Planned(total_bytes))

    def add(self, size: int) -> None:
        """Count bytes."""
        with self._lock:
            self._bytes += size

    def poll(self) -> None:
        """Tell what was counted since the last time, if only that the run is alive; what that raises goes to the caller."""
        with self._lock:
            size, self._bytes = self._bytes, 0
        if self._on_event is not None:
            self._on_event(Advanced(size))


def compare_parts(source: Source, parts: Sequence[Part], tally: Tally) -> list[tuple[Part, Comparison]]:
    """Return every part with what it has turned out to be, in the order in which they lie in the source's files.

    What the source's reads raise, and what the tally's events raise, ends all threads first.
    """
    ordered = sorted(parts, key=lambda part: (part.shard, part.ranges[:1]))
    if source.is_remote:
        source.read_ahead(ReadAhead(_reads(ordered), HELD_BYTES))

    def watched() -> None:
        try:
            tally.poll()
        except BaseException:
            source.stop()  # no thread waits for a network while the others end
            raise

    return list(zip(ordered, in_parallel(partial(_compare, source, tally), ordered, watched), strict=True))


def _compare(source: Source, tally: Tally, stopped: Stopped, part: Part) -> Comparison:
    def after_tile(shard: str, ranges: list[tuple[int, int]]) -> None:
        if stopped():
            raise CancelledError
        for offset, size in ranges:
            tally.add(size)
            if source.is_remote:
                source.drop_cached(shard, offset, size)

    return part.compare(source, after_tile)


def _reads(parts: Sequence[Part]) -> Iterator[tuple[str, Sequence[ReadUnit]]]:
    """Yield what is read of each file, a request at a time."""
    for shard, found in groupby(parts, attrgetter("shard")):
        places = [place for part in found for place in part.ranges]
        yield (
            shard,
            [
                ReadUnit((ByteRange(shard, begin, min(begin + SEGMENT_BYTES, offset + size)),))
                for offset, size in places
                for begin in range(offset, offset + size, SEGMENT_BYTES)
            ],
        )
