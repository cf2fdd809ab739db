"""Do the same with many files, or parts of them, from as many threads as there are cores.

Called by `output` for digests and by `comparison`, never while the workers of a run are at it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Stopped = Callable[[], bool]
_MOST_AT_ONCE = 16
_POLL_SECONDS = 0.1


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(
    function: Callable[[Stopped, Item], Result], items: Iterable[Item], poll: Callable[[], object] | None = None
) -> list[Result]:
    """Return what a function makes of each item, in their order, from as many threads as there are cores.

    `poll` is called in this thread about every tenth of a second. What it raises, the first error, and an interruption stop
    everything: `function` asks its first argument now and then whether that has happened, and then raises whatever it likes.
    """
    stopped = threading.Event()
    pool = ThreadPoolExecutor(min(available_cores(), _MOST_AT_ONCE))
    try:
        futures = [pool.submit(function, stopped.is_set, item) for item in items]
        left = set(futures)
        while left:
            done, left = wait(left, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if poll is not None:
                poll()
        return [future.result() for future in futures]
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
