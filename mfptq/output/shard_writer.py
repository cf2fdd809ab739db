"""Write one output shard of a run: its bytes in any order, its digest, its error statistics, and its name at the end.

Called by `execution.engine` only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import asdict

from ..kernels import ErrorStats
from ..planning.jobs import ShardJob
from ..storage.partial_file import PartialFile, Piece
from .journal import ShardResult


class ShardWriter:
    """One output shard. Workers write into it in any order; the thread that ends its last task completes it.

    Threads: `write`, `note`, `expect` and `finish_task` from any worker; `complete` from the one that `finish_task` told so;
    `discard` when no worker runs any more. `_lock` guards `_pending` and `_stats`.
    """

    def __init__(self, job: ShardJob, file: PartialFile) -> None:
        self.job = job
        self._file = file
        self._pending = 0
        self._stats: dict[str, ErrorStats] = {}
        self._lock = threading.Lock()
        try:
            file.write(job.head, 0)
        except BaseException:
            file.discard()
            raise

    def expect(self, tasks: int) -> None:
        """Count tasks that will have to be finished before the shard is complete."""
        with self._lock:
            self._pending += tasks

    def finish_task(self) -> bool:
        """Count one task as done; return whether it was the last, so that the caller must complete the shard."""
        with self._lock:
            self._pending -= 1
            return self._pending == 0

    def write(self, pieces: Iterable[Piece], buffer: memoryview) -> None:
        """Write pieces, then let the digest catch up by way of `buffer`, which may be what they lie in."""
        for offset, data in pieces:
            self._file.write(data, offset)
        self._file.hash_written(buffer)

    def note(self, pattern: str, stats: ErrorStats) -> None:
        """Add the error statistics of some weights whose names have this pattern."""
        with self._lock:
            self._stats.setdefault(pattern, ErrorStats()).add(stats)

    def complete(self, buffer: memoryview, *, forget: bool) -> ShardResult:
        """Hash what is left, make the file durable under its name, and return what became of it."""
        digest = self._file.sha256(buffer)
        self._file.commit(forget=forget)
        stats = {pattern: asdict(each) for pattern, each in sorted(self._stats.items())}
        return ShardResult(self.job.name, digest, self.job.size, stats)

    def discard(self) -> None:
        """Remove the unfinished file."""
        self._file.discard()
