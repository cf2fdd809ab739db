"""Hold ranges of remote files in memory, from the moment they are fetched until they are dropped, within a budget.

`hub_source` reads through it. The work announces what it will read (`ReadAhead`); connections fetch that in its order, a
little ahead. What is asked for before its turn goes first. What fits into no budget is not held: the reader fetches it
itself, as often as it reads it. So a reader never waits for memory, and no order of reads can stop the run.
"""

from __future__ import annotations

import mmap
import threading
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter, itemgetter

from .reads import SEGMENT_BYTES, ByteRange, ReadAhead, ReadUnit

AHEAD_BYTES = 32 * 2**20  # fetched, or being fetched, before any of it was asked for
CONNECTIONS = 8
NOTICE_BYTES = 2**20  # readers of a segment are woken this often


Fetch = Callable[[ByteRange, memoryview, Callable[[int], None]], None]


@dataclass(eq=False, slots=True)
class _Segment:
    """One request: `filled` bytes of `place` are there; `dropped` bytes will not be read again."""

    place: ByteRange
    data: mmap.mmap | None = None
    filled: int = 0
    dropped: int = 0
    touched: bool = False
    released: bool = False
    error: BaseException | None = None


_start = attrgetter("place.start")
_first = itemgetter(0)


class Window:
    """Ranges in memory. `copy` and `drop` are called from any thread, `_work` runs in the window's own.

    `_changed` guards all state but the bytes of a segment, which one connection writes and readers read up to `filled`.
    `fetch` fills a buffer from a range and reports how many bytes are there; it is called by several threads at once.
    """

    def __init__(self, fetch: Fetch, ahead: ReadAhead, connections: int = CONNECTIONS) -> None:
        self._fetch = fetch
        self._order = ahead.order
        self._budget = ahead.budget
        self._changed = threading.Condition()
        self._segments: dict[str, list[_Segment]] = {}
        self._pending: dict[str, list[tuple[int, int, ReadUnit]]] = {}
        self._pulled: set[str] = set()
        self._queue: deque[ReadUnit] = deque()
        self._waiting: deque[_Segment] = deque()
        self._held = self._untouched = self._later = 0
        self._closed = self._announced = False
        self._threads = [
            threading.Thread(target=self._work, name="mfptq-fetch", daemon=True) for _ in range(connections)
        ]
        for thread in self._threads:
            thread.start()

    def copy(self, name: str, offset: int, buffer: memoryview) -> int:
        """Copy what is held from `offset` on, waiting for it where it is on its way; 0 if the caller must fetch it.

        Returns how many bytes of `buffer` were filled.
        """
        with self._changed:
            segment = self._find(name, offset) or self._demand(name, offset)
            if segment is None:
                return 0
            self._touch(segment)
            begin = offset - segment.place.start
            size = min(len(buffer), segment.place.end - offset)
            while segment.filled < begin + size and not segment.released:
                if segment.error is not None:
                    raise segment.error
                self._changed.wait()
            data = segment.data
        if data is None:  # dropped by someone else meanwhile
            return 0
        buffer[:size] = memoryview(data)[begin : begin + size]
        return size

    def gap(self, name: str, offset: int, limit: int) -> int:
        """Return how many bytes from `offset` on, at most `limit`, lie before the next range that is held."""
        with self._changed:
            held = self._segments.get(name, [])
            place = bisect_right(held, offset, key=_start)
            return min(limit, held[place].place.start - offset) if place < len(held) else limit

    def drop(self, name: str, offset: int, size: int) -> None:
        """Let go of a range; of the whole file for a size of 0."""
        with self._changed:
            end = offset + size if size else 2**63
            overlapping = [each for each in self._segments.get(name, []) if _overlap(each.place, offset, end) > 0]
            for segment in overlapping:
                segment.dropped += _overlap(segment.place, offset, end)
                if segment.dropped >= segment.place.size:
                    self._release(segment)
            if not overlapping:
                self._skip(name, offset, end)
            self._changed.notify_all()

    def close(self) -> None:
        """End all fetching and let go of everything; readers that wait get the error of what they wait for."""
        self.stop(RuntimeError("the window is closed"))
        for thread in self._threads:
            thread.join()

    def stop(self, error: BaseException) -> None:
        """Begin no other fetch, and raise `error` in every reader that waits."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            for segment in [each for held in self._segments.values() for each in held]:
                segment.error = segment.error or error
            self._changed.notify_all()

    def _find(self, name: str, offset: int) -> _Segment | None:
        held = self._segments.get(name, [])
        place = bisect_right(held, offset, key=_start) - 1
        return held[place] if place >= 0 and held[place].place.end > offset else None

    def _demand(self, name: str, offset: int) -> _Segment | None:
        """Fetch, before anything else, the unit that a reader asks for before its turn, if there is room for it."""
        while (unit := self._unit_at(name, offset)) is None and name not in self._pulled and self._pull():
            pass
        if self._closed or unit is None or unit.taken or self._held + unit.size > self._budget:
            return None
        self._waiting.extendleft(reversed(self._allocate(unit)))
        self._changed.notify_all()
        return self._find(name, offset)

    def _unit_at(self, name: str, offset: int) -> ReadUnit | None:
        places = self._pending.get(name, [])
        place = bisect_right(places, offset, key=_first) - 1
        return places[place][2] if place >= 0 and places[place][1] > offset else None

    def _pull(self) -> bool:
        """Take note of what is read of the next file; return whether there is one."""
        if self._announced:
            return False
        found = next(self._order, None)
        if found is None:
            self._announced = True
            return False
        name, units = found
        self._pulled.add(name)
        self._queue.extend(units)
        for unit in units:
            for each in unit.ranges:
                self._pending.setdefault(each.name, []).append((each.start, each.end, unit))
        for places in self._pending.values():
            places.sort(key=_first)
        return True

    def _allocate(self, unit: ReadUnit) -> list[_Segment]:
        unit.taken = True
        made: list[_Segment] = []
        for wanted in unit.ranges:
            if wanted.later and self._later + wanted.size > self._budget // 4:
                continue  # read now and again later, by whoever needs it
            for place in self._missing(wanted):
                made.append(_Segment(place))
                self._held += place.size
                self._untouched += place.size
                self._later += place.size if place.later else 0
        for segment in made:
            insort(self._segments.setdefault(segment.place.name, []), segment, key=_start)
        return made

    def _missing(self, wanted: ByteRange) -> Iterator[ByteRange]:
        """Yield the parts of a range that are not held yet, in pieces of one request each."""
        begin = wanted.start
        while begin < wanted.end:
            known = self._find(wanted.name, begin)
            if known is not None:
                begin = known.place.end
                continue
            end = min(begin + SEGMENT_BYTES, wanted.end)
            held = self._segments.get(wanted.name, [])
            place = bisect_right(held, begin, key=_start)
            if place < len(held):
                end = min(end, held[place].place.start)
            yield ByteRange(wanted.name, begin, end, wanted.later)
            begin = end

    def _touch(self, segment: _Segment) -> None:
        if not segment.touched:
            segment.touched = True
            self._untouched -= segment.place.size
            self._changed.notify_all()

    def _release(self, segment: _Segment) -> None:
        self._touch(segment)
        self._segments[segment.place.name].remove(segment)
        self._held -= segment.place.size
        self._later -= segment.place.size if segment.place.later else 0
        segment.data, segment.released = None, True
        if segment in self._waiting:
            self._waiting.remove(segment)

    def _skip(self, name: str, offset: int, end: int) -> None:
        """Note that announced bytes were read without us: they need not be fetched ahead."""
        unit = self._unit_at(name, offset)
        if unit is not None:
            unit.dropped += sum(max(0, _overlap(each, offset, end)) for each in unit.ranges if each.name == name)
            unit.taken = unit.taken or unit.dropped >= unit.size

    def _work(self) -> None:
        """Fetch one segment after the other, until the window is closed."""
        try:
            while (segment := self._wait_for_next()) is not None:
                self._fill(segment)
        except BaseException as error:  # of what announces the reads
            self.stop(error)

    def _wait_for_next(self) -> _Segment | None:
        with self._changed:
            while (segment := self._next()) is None and not self._closed:
                self._changed.wait()
            return segment

    def _next(self) -> _Segment | None:
        if not self._waiting and not self._closed:
            self._look_ahead()
        return self._waiting.popleft() if self._waiting else None

    def _look_ahead(self) -> None:
        """Allocate the unit whose turn it is, if there is room."""
        while self._queue or self._pull():
            if not self._queue:
                continue
            unit = self._queue[0]
            if not unit.taken and unit.size <= self._budget:
                ahead = self._untouched + unit.size
                if (self._untouched and ahead > AHEAD_BYTES) or self._held + unit.size > self._budget:
                    return
                self._waiting.extend(self._allocate(unit))
            self._queue.popleft()
            if self._waiting:
                return

    def _fill(self, segment: _Segment) -> None:
        noted = 0

        def note(filled: int) -> None:
            nonlocal noted
            if filled - noted >= NOTICE_BYTES or filled == segment.place.size:
                noted = filled
                with self._changed:
                    segment.filled = filled
                    self._changed.notify_all()

        try:
            data = mmap.mmap(-1, segment.place.size)  # which goes back to the system at once when it is let go
            with self._changed:
                segment.data = None if segment.released else data
            self._fetch(segment.place, memoryview(data), note)
        except BaseException as error:  # whoever reads the segment raises it
            with self._changed:
                segment.error = error
                self._changed.notify_all()


def _overlap(place: ByteRange, start: int, end: int) -> int:
    return min(place.end, end) - max(place.start, start)
