"""Threads that share lanes of small tasks: the newest follow-up first, then the next task of the lane's lazy supply.

Kernels, reads and writes all release the interpreter lock, so threads are enough. A task is small (one tile), so that the
last tensor is never one worker's alone; follow-ups come first, so that what was just read is used while it is in cache.
Every worker has a lane of its own, or shares it with its neighbours, and goes to others only when nothing is left there: what
belongs together, such as one file's tiles, is done in about its order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

State = TypeVar("State")
Task = Callable[[State], None]
_POLL_SECONDS = 0.1


def running_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Return a pool whose threads run already: to begin one takes milliseconds when all cores are busy."""
    pool = ThreadPoolExecutor(threads, name)
    gate = threading.Lock()

    def wait() -> None:
        with gate:
            pass

    try:
        with gate:
            for _ in range(threads):
                pool.submit(wait)
    except BaseException:
        pool.shutdown()
        raise
    return pool


class Lane(Generic[State]):
    """Tasks that belong together: those to come, of which one is asked for at a time, and follow-ups that are ready."""

    def __init__(self, supply: Iterator[Task[State]]) -> None:
        self.supply = supply
        self.ready: list[Task[State]] = []
        self.open = False  # whether the supply may be asked: it is not exhausted, and nobody is asking


class Workers(Generic[State]):
    """A pool that runs tasks until every supply is exhausted and every follow-up is done."""

    def __init__(self, supplies: Iterable[Iterator[Task[State]]], states: Sequence[State]) -> None:
        self._lanes = [Lane(supply) for supply in supplies]
        self._running = len(
            self._lanes
        )  # asking a supply counts as running, since it may yet yield a task; all are asked first
        self._begun = 0
        self._ended = 0
        self._error: BaseException | None = None
        self._lock = threading.RLock()  # taken itself: a signal that meets a condition's `__enter__` leaves it taken
        self._changed = threading.Condition(self._lock)  # workers wait here for tasks, and nobody else
        self._stopped = threading.Condition(self._lock)
        self._threads = [
            threading.Thread(target=self._work, args=(state, number), name=f"mfptq-{number}", daemon=True)
            for number, state in enumerate(states)
        ]

    def add(self, tasks: Iterable[Task[State]], lane: int = 0) -> None:
        """Add follow-up tasks to a lane; they run in the given order, before anything else there."""
        with self._lock:
            ready = self._lanes[lane].ready
            before = len(ready)
            ready.extend(reversed(list(tasks)))
            self._changed.notify(len(ready) - before)

    def expect(self) -> None:
        """Note that work goes on elsewhere which may still add tasks, until `settle`."""
        with self._lock:
            self._running += 1

    def settle(self) -> None:
        """Note that a task, or work elsewhere, has ended."""
        with self._lock:
            self._running -= 1
            if not self._running:
                self._changed.notify_all()

    def run(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Run everything, and `meanwhile` in the calling thread; raise the first error, after every worker has stopped.

        Interruptible at any time.
        """
        try:
            with self._lock:  # so nobody begins before all can, since threads that begin wait long for busy ones
                for thread in self._threads:
                    thread.start()
            if meanwhile is not None:
                meanwhile()
            self._wait(len(self._threads))
        except BaseException as error:
            try:
                self._fail(error)  # a thread that has not begun yet will find nothing to do
                self._wait(0)
            finally:
                self._let_go()
            raise
        if self._error is not None:
            raise self._error

    def _wait(self, threads: int) -> None:
        """Wait until as many threads, and all that have begun, have ended.

        Threads count themselves: an interrupted `Thread.join` may take a running thread for an ended one.
        """
        with self._lock:
            while self._ended < max(self._begun, threads):
                self._stopped.wait(_POLL_SECONDS)

    def _let_go(self) -> None:
        """Release the lock however often this thread holds it: where a signal has raised, that may be once too often."""
        with suppress(RuntimeError):
            while True:
                self._lock.release()

    def _offer(self, lane: Lane[State], task: Task[State] | None) -> None:
        """Take what a lane's supply has yielded to the tasks that are ready; None: it is exhausted."""
        with self._lock:
            lane.ready += [task] if task is not None else []
            lane.open = task is not None
            self._running -= 1
            self._changed.notify_all()

    def _fill(self) -> None:
        """Ask every lane for its first task: one thread does that faster than all at once."""
        tasks: list[Task[State] | None] = []
        for lane in self._lanes:
            if self._error is not None:
                return
            tasks.append(next(lane.supply, None))
        with self._lock:  # whoever saw some of them only would leave its own lane
            for lane, task in zip(self._lanes, tasks, strict=True):
                self._offer(lane, task)

    def _work(self, state: State, number: int) -> None:
        with self._lock:
            self._begun += 1
            first = self._begun == 1
        home = number * len(self._lanes) // len(self._threads)
        lanes = self._lanes[home:] + self._lanes[:home]
        try:
            if first:
                self._fill()
            while (task := self._next(lanes)) is not None:
                task(state)
                self.settle()
        except BaseException as error:
            self._fail(error)
        finally:
            with self._lock:
                self._ended += 1
                self._stopped.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._changed.notify_all()

    def _next(self, lanes: Sequence[Lane[State]]) -> Task[State] | None:
        """Return the next task, waiting for one if others may still add some; None when all is done or failed."""
        while True:
            with self._lock:
                while (lane := self._first(lanes)) is None and self._running and not self._error:
                    self._changed.wait()
                if lane is None or self._error:
                    return None
                self._running += 1
                if lane.ready:
                    return lane.ready.pop()
                lane.open = False
            self._offer(lane, next(lane.supply, None))

    def _first(self, lanes: Sequence[Lane[State]]) -> Lane[State] | None:
        """Return the first lane that has something to do."""
        return next((lane for lane in lanes if lane.ready or lane.open), None)
