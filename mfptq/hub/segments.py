"""Keep the requests that a run will make, and find those that hold a given byte; `window` calls it with its lock held."""

from __future__ import annotations

import mmap
from bisect import bisect_right, insort
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter

from ..checkpoint.reads import ByteRange, ReadUnit


@dataclass(eq=False, slots=True)
class Segment:
    """One request: `filled` bytes of `place` are there, and `dropped` will not be read again. It belongs to `unit`.

    `allocated`: there is room for it. `lasting`: it was read, and stays for the turn of another file or to the end of its own.
    `hashed`: the digest of the file has taken it; `retained`: nobody but the digest needs it any more.
    """

    place: ByteRange
    unit: ReadUnit
    data: mmap.mmap | None = None
    filled: int = 0
    dropped: int = 0
    allocated: bool = False
    lasting: bool = False
    released: bool = False
    hashed: bool = False
    retained: bool = False
    error: BaseException | None = None

    @property
    def is_spent(self) -> bool:
        """Whether no byte of it will be read again."""
        return self.dropped >= self.place.size


_start = attrgetter("place.start")


class SegmentTable:
    """Segments by file and place; those of one file do not overlap."""

    def __init__(self) -> None:
        self._of: dict[str, list[Segment]] = {}

    def __iter__(self) -> Iterator[Segment]:
        """Yield every segment."""
        for segments in self._of.values():
            yield from segments

    def announce(self, unit: ReadUnit, most: int) -> list[Segment]:
        """Take in what is not known yet of a unit, in pieces of at most `most` bytes; return them in its order."""
        made = [Segment(place, unit) for wanted in unit.ranges for place in self._unknown(wanted, most)]
        for segment in made:
            insort(self._of.setdefault(segment.place.name, []), segment, key=_start)
        return made

    def find(self, name: str, offset: int) -> Segment | None:
        """Return the segment that holds a byte."""
        known = self._of.get(name, [])
        place = bisect_right(known, offset, key=_start) - 1
        return known[place] if place >= 0 and known[place].place.end > offset else None

    def overlapping(self, name: str, start: int, end: int) -> list[Segment]:
        """Return the segments that hold any byte of a range."""
        known = self._of.get(name, [])
        first = max(0, bisect_right(known, start, key=_start) - 1)
        found = known[first : bisect_right(known, end - 1, key=_start)]
        return [each for each in found if overlap(each.place, start, end)]

    def gap(self, name: str, offset: int, limit: int) -> int:
        """Return how many bytes from `offset` on, at most `limit`, lie before the next segment that has room."""
        for each in self.overlapping(name, offset, offset + limit):
            if each.allocated and each.place.start > offset:
                return each.place.start - offset
        return limit

    def remove(self, segment: Segment) -> None:
        """Forget a segment."""
        self._of[segment.place.name].remove(segment)

    def _unknown(self, wanted: ByteRange, most: int) -> Iterator[ByteRange]:
        begin = wanted.start
        for known in [*self.overlapping(wanted.name, wanted.start, wanted.end), None]:
            end = wanted.end if known is None else min(wanted.end, known.place.start)
            for start in range(begin, end, most):
                yield wanted._replace(start=start, end=min(start + most, end))
            begin = begin if known is None else known.place.end


def overlap(place: ByteRange, start: int, end: int) -> int:
    """Return how many bytes of a range lie from `start` to `end`."""
    return max(0, min(place.end, end) - max(place.start, start))


def private_memory(size: int) -> mmap.mmap:
    """Return memory that goes back to the system at once when it is let go."""
    data = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without: then the system takes 0.4 s of a core for each GB, page by page
            data.madvise(mmap.MADV_HUGEPAGE)
    return data
