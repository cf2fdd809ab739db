"""Count bytes that threads are done with, and tell of them in the thread that waits for the others.

Called by `verification`; a conversion has events of its own.
"""

from __future__ import annotations

import threading

from .events import Advanced, OnEvent, Planned


class Tally:
    """A count that becomes events. Threads: `add` from any; `begin` and `poll` from the one that `on_event` belongs to."""

    def __init__(self, on_event: OnEvent | None) -> None:
        self._on_event = on_event
        self._bytes = 0
        self._lock = threading.Lock()

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
