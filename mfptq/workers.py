"""Threads that share a stream of small tasks: the newest follow-up first, then the next task of a lazy supply.

Kernels, reads and writes all release the interpreter lock, so threads are enough. A task is small (one tile), so that the
last tensor is never one worker's alone; follow-ups come first, so that what was just read is used while it is in cache.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

State = TypeVar("State")
Task = Callable[[State], None]
_POLL_SECONDS = 0.1


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(Generic[State]):
    """A pool that runs tasks until the supply is empty and every follow-up is done."""

    def __init__(self, supply: Iterator[Task[State]], states: Iterable[State]) -> None:
        self._supply = supply
        self._ready: list[Task[State]] = []
        self._running = 0
        self._begun = 0
        self._ended = 0
        self._exhausted = False
        self._error: BaseException | None = None
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # workers wait here for tasks, and nobody else
        self._stopped = threading.Condition(lock)
        self._supplying = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(state,), name=f"mfptq-{number}", daemon=True)
            for number, state in enumerate(states)
        ]

    def add(self, tasks: Iterable[Task[State]]) -> None:
        """Add follow-up tasks; they run in the given order, before anything else."""
        with self._changed:
            before = len(self._ready)
            self._ready.extend(reversed(list(tasks)))
            self._changed.notify(len(self._ready) - before)

    def run(self) -> None:
        """Run everything; raise the first error, after every worker has stopped. Interruptible at any time."""
        try:
            for thread in self._threads:
                thread.start()
            self._wait(len(self._threads))
        except BaseException as error:
            self._fail(error)  # a thread that has not begun yet will find nothing to do
            self._wait(0)
            raise
        if self._error is not None:
            raise self._error

    def _wait(self, threads: int) -> None:
        """Wait until as many threads, and all that have begun, have ended.

        Threads count themselves: an interrupted `Thread.join` may take a running thread for an ended one.
        """
        with self._stopped:
            while self._ended < max(self._begun, threads):
                self._stopped.wait(_POLL_SECONDS)

    def _work(self, state: State) -> None:
        with self._changed:
            self._begun += 1
        try:
            while (task := self._next()) is not None:
                task(state)
                with self._changed:
                    self._running -= 1
                    if not self._running:
                        self._changed.notify_all()
        except BaseException as error:
            self._fail(error)
        finally:
            with self._changed:
                self._ended += 1
                self._stopped.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _next(self) -> Task[State] | None:
        """Return the next task, waiting for one if others may still add some; None when all is done or failed."""
        while True:
            with self._changed:
                while not self._ready and self._exhausted and self._running and not self._error:
                    self._changed.wait()
                if self._error or (not self._ready and self._exhausted):
                    return None
                if self._ready:
                    self._running += 1
                    return self._ready.pop()
                self._running += 1  # taking from the supply counts as running: it may yet yield a task
            task = self._take()
            if task is not None:
                return task

    def _take(self) -> Task[State] | None:
        with self._supplying:
            task = next(self._supply, None)
        if task is None:
            with self._changed:
                self._exhausted = True
                self._running -= 1
                self._changed.notify_all()
        return task
