"""Say what a run will read, for a source that fetches ahead: units of ranges, in the order of the work.

Made by `execution.reading_order`; `window` fetches by it. Data only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SEGMENT_BYTES = 4 * 2**20  # of one request


class ByteRange(NamedTuple):
    """Bytes `start` to `end` of a file.

    `later`: they are read now, and once more in the turn of another file. `shared`: other tiles need some of the same bytes,
    so that they are dropped with their file only.
    """

    name: str
    start: int
    end: int
    later: bool = False
    shared: bool = False

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ReadUnit:
    """Ranges that are needed together, in the order of fetching: the weights of a fused group, or copied tensors."""

    ranges: tuple[ByteRange, ...]

    @property
    def size(self) -> int:
        """Length of all ranges, in bytes."""
        return sum(each.size for each in self.ranges)


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """What will be read, file by file in the order of the work, and how many bytes may be held in memory.

    `digests`: files that are read whole are to be compared with what whoever stores them says is their digest.
    """

    order: Iterator[tuple[str, Sequence[ReadUnit]]]
    budget: int
    digests: bool = False
