"""An output file while it is being filled: how much work is left, how far its digest is, what became of its weights."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from ..kernels import ErrorStats
from ..planning.jobs import ShardJob
from ..storage.digest import HASH_STEP
from ..storage.partial_file import PartialFile


@dataclass(slots=True)
class OpenShard:
    """An output file being filled: when none of its work is left, it is finished."""

    job: ShardJob
    file: PartialFile
    lane: int
    digest: str = ""
    left: int = 1
    hashing: bool = False
    kinds: dict[str, ErrorStats] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, stats: ErrorStats) -> None:
        """Add the statistics of some weights of a kind."""
        with self.lock:
            self.kinds.setdefault(kind, ErrorStats()).add(stats)

    def expect(self, tasks: int) -> None:
        """Note that more work has been found."""
        with self.lock:
            self.left += tasks

    def begin_hashing(self) -> bool:
        """Return whether the caller must take a step of the file's digest: never two at once, and none at the end.

        The rest is left to when the file is finished: the disk has to be waited for then anyway.
        """
        with self.lock:
            due = not self.hashing and self.left > 1 and self.file.unhashed >= HASH_STEP
            self.hashing |= due
            self.left += due
            return due

    def settle(self) -> bool:
        """Note that a piece of work is done; return whether it was the last."""
        with self.lock:
            self.left -= 1
            return self.left == 0
