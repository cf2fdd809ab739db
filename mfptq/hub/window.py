"""Hold ranges of remote files in memory, from the moment they are fetched until they are dropped, within a budget.

Called by `source` for every read. The work announces what it will read (`ReadAhead`); connections fetch that in its order, as
far ahead as AHEAD_BYTES or the largest unit allow. What is asked for before its turn goes first. What fits into no budget is
not held: the reader fetches it itself, as often as it reads it. So a reader never waits for memory, and no order of reads can
stop the run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ..checkpoint.reads import SEGMENT_BYTES, ByteRange, ReadAhead
from .file_digests import FileDigests
from .segments import Segment, SegmentTable, overlap, private_memory

AHEAD_BYTES = 32 * 2**20  # held of what is read once, or on its way; a larger unit may take its size instead
CONNECTIONS = 8
NOTICE_BYTES = 2**20  # readers of a segment are woken this often


Fetch = Callable[[ByteRange, memoryview, Callable[[int], None]], None]


class Window:
    """Ranges in memory. `copy` and `drop` are called from any thread, `_work` runs in the window's own.

    One lock guards all state but the bytes of a segment, which one connection writes and others read up to `filled`. Readers wait
    for `_changed`. Connections wait for `_room`, and are woken one by one: whoever finds something to fetch wakes the next.
    `fetch` fills a buffer from a range and reports how many bytes are there; it is called by several threads at once.
    `digests` takes every file's bytes in order; of what is dropped before its turn, AHEAD_BYTES at most stay until then.
    """

    def __init__(
        self, fetch: Fetch, ahead: ReadAhead, digests: FileDigests | None = None, *, connections: int = CONNECTIONS
    ) -> None:
        self._fetch = fetch
        self._order = ahead.order
        self._budget = ahead.budget
        self._digests = digests
        lock = threading.RLock()
        self._changed, self._room = threading.Condition(lock), threading.Condition(lock)
        self._table = SegmentTable()
        self._pulled: set[str] = set()
        self._queue: deque[Segment] = deque()  # announced, in the order in which they are fetched
        self._demanded: deque[Segment] = deque()  # asked for before their turn
        # Bytes: of all that is held; of what stays for another turn; of what is read again in another file's turn; of what only a
        # digest still needs; and of the largest unit so far that can be held.
        self._held = self._lasting = self._later = self._unhashed = self._largest = 0
        self._hashing: set[str] = set()  # files whose digest a thread is at
        self._unchecked: set[str] = set()  # files whose bytes do not come in order
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
            segment = self._find(name, offset)
            while segment is not None and not segment.allocated and self._is_digest_behind(name, segment.place.size):
                self._changed.wait()
            if segment is None or not (segment.allocated or self._demand(segment)):
                return 0
            self._note_read(segment)
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
            return self._table.gap(name, offset, limit)

    def drop(self, name: str, offset: int, size: int) -> None:
        """Let go of a range; of the whole file for a size of 0."""
        with self._changed:
            end = offset + size if size else 2**63
            for segment in self._table.overlapping(name, offset, end):
                was_spent = segment.is_spent
                segment.dropped += overlap(segment.place, offset, end)
                if segment.released:  # with others of its file, which is unchecked now
                    continue
                if segment.is_spent and not (size and self._awaits_digest(segment)):
                    self._release(segment)
                elif segment.is_spent and not was_spent:
                    self._keep_for_digest(segment)
            self._changed.notify_all()

    def hash_ready(self, name: str, *, wait: bool = False) -> None:
        """Have a file's digest take what is there and comes next; `wait` for a thread that is at it, else leave it to that."""
        while (segment := self._next_to_hash(name, wait=wait)) is not None:
            assert self._digests is not None
            assert segment.data is not None
            end = 0
            try:
                end = self._digests.take(name, segment.place.start, memoryview(segment.data))
            finally:
                with self._changed:
                    self._hashing.discard(name)
                    segment.hashed = end >= segment.place.end
                    if segment.is_spent and not segment.released:
                        self._release(segment)
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
            for segment in self._table:
                segment.error = segment.error or error
            self._changed.notify_all()
            self._room.notify_all()

    def _find(self, name: str, offset: int) -> Segment | None:
        while (found := self._table.find(name, offset)) is None and name not in self._pulled and self._pull():
            pass
        return found

    def _pull(self) -> bool:
        """Take note of what is read of the next file; return whether there is one."""
        found = None if self._announced else next(self._order, None)
        if found is None:
            self._announced = True
            return False
        name, units = found
        self._pulled.add(name)
        for unit in units:
            self._queue.extend(self._table.announce(unit, SEGMENT_BYTES))
            if unit.size <= self._budget:
                self._largest = max(self._largest, unit.size)
        self._room.notify()
        return True

    def _demand(self, segment: Segment) -> bool:
        """Fetch a segment before all that was not asked for yet; return whether there is room for it."""
        if self._closed or not self._allocate(segment):
            return False
        self._demanded.append(segment)
        self._room.notify()
        return True

    def _allocate(self, segment: Segment) -> bool:
        """Make room for a segment of a unit that can be held; return whether there is any."""
        size = segment.place.size
        if segment.unit.size > self._budget or self._held + size > self._budget:
            return False
        if segment.place.later and self._later + size > self._budget // 4:
            self._release(segment)  # read now and again later, by whoever needs it
            return False
        segment.allocated = True
        self._held += size
        self._later += size if segment.place.later else 0
        return True

    def _note_read(self, segment: Segment) -> None:
        if (segment.place.later or segment.place.shared) and not segment.lasting:
            segment.lasting = True
            self._lasting += segment.place.size
            self._room.notify()

    def _awaits_digest(self, segment: Segment) -> bool:
        return self._digests is not None and not segment.hashed and segment.place.name not in self._unchecked

    def _is_digest_behind(self, name: str, more: int) -> bool:
        """Return whether a file's digest waits for bytes that are on their way, and much is held for it meanwhile."""
        if self._digests is None or self._closed or self._unhashed + more <= AHEAD_BYTES or name in self._unchecked:
            return False
        missing = self._table.find(name, self._digests.end(name))
        return missing is not None and missing.allocated and missing.error is None

    def _keep_for_digest(self, segment: Segment) -> None:
        """Hold what nobody reads any more until the digest has it; where that becomes too much, leave the file unchecked."""
        if not segment.allocated:  # the readers fetched it themselves
            self._release(segment)
            return
        self._forget_lasting(segment)
        segment.retained = True
        self._unhashed += segment.place.size
        if self._unhashed > AHEAD_BYTES:
            self._unchecked.add(segment.place.name)
            for each in [each for each in self._table.overlapping(segment.place.name, 0, 2**63) if each.is_spent]:
                self._release(each)

    def _next_to_hash(self, name: str, *, wait: bool) -> Segment | None:
        """Return the segment that holds the byte that the digest of a file lacks, for this thread to take it from."""
        with self._changed:
            while wait and name in self._hashing:
                self._changed.wait()
            if self._digests is None or name in self._hashing or name in self._unchecked:
                return None
            segment = self._table.find(name, self._digests.end(name))
            if segment is None or segment.data is None or segment.filled < segment.place.size:
                return None
            self._hashing.add(name)
            return segment

    def _release(self, segment: Segment) -> None:
        self._table.remove(segment)
        segment.released = True
        if not segment.allocated:
            return
        size, segment.data = segment.place.size, None
        self._room.notify()
        self._forget_lasting(segment)
        self._held -= size
        self._later -= size if segment.place.later else 0
        self._unhashed -= size if segment.retained else 0

    def _forget_lasting(self, segment: Segment) -> None:
        self._lasting -= segment.place.size if segment.lasting else 0
        segment.lasting = False

    def _work(self) -> None:
        """Fetch one segment after the other, until the window is closed."""
        try:
            while (segment := self._wait_for_next()) is not None:
                self._fill(segment)
                self.hash_ready(segment.place.name)
        except BaseException as error:  # of what announces the reads
            self.stop(error)

    def _wait_for_next(self) -> Segment | None:
        with self._changed:
            while not self._closed:
                if (segment := self._next()) is not None:
                    self._room.notify()
                    return segment
                self._room.wait()
            return None

    def _next(self) -> Segment | None:
        """Return what to fetch next: what was asked for, else what is announced, if there is room ahead of the work."""
        while self._demanded:
            if not (segment := self._demanded.popleft()).released:
                return segment
        while self._queue or self._pull():
            if not self._queue:
                continue
            segment = self._queue[0]
            if not (segment.allocated or segment.released) and segment.unit.size <= self._budget:
                if not self._has_room(segment):
                    return None
                if self._allocate(segment):
                    return self._queue.popleft()
            self._queue.popleft()
        return None

    def _has_room(self, segment: Segment) -> bool:
        working = self._held - self._lasting + segment.place.size
        return working <= max(AHEAD_BYTES, self._largest) and self._held + segment.place.size <= self._budget

    def _fill(self, segment: Segment) -> None:
        noted = 0

        def note(filled: int) -> None:
            nonlocal noted
            if filled - noted >= NOTICE_BYTES or filled == segment.place.size:
                noted = filled
                with self._changed:
                    segment.filled = filled
                    self._changed.notify_all()

        try:
            data = private_memory(segment.place.size)
            with self._changed:
                segment.data = None if segment.released else data
            self._fetch(segment.place, memoryview(data), note)
        except BaseException as error:  # whoever reads the segment raises it
            with self._changed:
                segment.error = error
                self._changed.notify_all()
