"""Run tasks on threads: follow-ups first, the newest before all others, then the next task of one lazy supply.

Kernels, reads and writes release the interpreter's lock, so threads are enough. A task is small (one tile), so that the last
tensor is never one worker's alone; follow-ups come first, so that what was just read is used while it is in the page cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from .events import Advanced, Event, OnEvent, ignore

State = TypeVar("State")
Task = Callable[[State], None]
POLL_SECONDS = 0.1


class WorkerPool(Generic[State]):
    """Threads, one for each state, that run tasks until the supply is exhausted and every follow-up is done.

    Threads: `add` and `emit` from tasks and from the supply, `run` from the caller. `_lock` guards `_ready`, `_asking` and
    `_active`, the number of workers that run a task or ask the supply, so that more tasks may still come. The calling thread
    takes no lock: an exception that a signal raises in it cannot leave one taken. It learns everything from `_events`.
    """

    def __init__(self, supply: Iterator[Task[State]], states: Sequence[State]) -> None:
        self._supply = supply
        self._states = states
        self._ready: list[Task[State]] = []
        self._asking = False  # a generator cannot be asked twice at once
        self._exhausted = False
        self._active = 0
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._events: SimpleQueue[Event | None] = SimpleQueue()  # None: a worker has ended
        self._begun: list[
            int
        ] = []  # one entry for each worker that runs, or has run; its length is read without a lock
        self._started = self._ended = 0  # the calling thread's own

    def add(self, tasks: Iterable[Task[State]]) -> None:
        """Add follow-up tasks; they run in the given order, before anything else."""
        with self._lock:
            before = len(self._ready)
            self._ready.extend(reversed(list(tasks)))
            self._changed.notify(len(self._ready) - before)

    def emit(self, event: Event) -> None:
        """Have an event delivered in the calling thread."""
        self._events.put(event)

    def run(self, on_event: OnEvent) -> None:
        """Run everything; raise the first error, after every worker has stopped.

        `on_event` is called in this thread, at least every POLL_SECONDS (with `Advanced(0)` when nothing has moved): what
        it raises, and a KeyboardInterrupt, stop the run like an error.
        """
        try:
            for number, state in enumerate(self._states):
                threading.Thread(target=self._work, args=(state,), name=f"mfptq-{number}", daemon=True).start()
                self._started += 1
            self._deliver(on_event)
        except BaseException as error:
            self._error = self._error or error
            self._deliver(ignore)
            raise
        if self._error is not None:
            raise self._error

    def _deliver(self, on_event: OnEvent) -> None:
        """Hand on events until every worker has ended, one whose start was interrupted included."""
        while self._ended < max(self._started, len(self._begun)):
            try:
                event = self._events.get(timeout=POLL_SECONDS)
            except Empty:
                event = Advanced(0)
            if event is None:
                self._ended += 1
            else:
                on_event(event)

    def _work(self, state: State) -> None:
        self._begun.append(1)
        try:
            while (task := self._next()) is not None:
                task(state)
                self._finish()
        except BaseException as error:
            self._error = self._error or error
        finally:
            self._events.put(None)

    def _finish(self) -> None:
        with self._lock:
            self._active -= 1
            if not self._active:
                self._changed.notify_all()

    def _next(self) -> Task[State] | None:
        """Return the next task, waiting for one if others may still add some; None when all is done or failed."""
        with self._lock:
            while not self._error:
                if self._ready:
                    self._active += 1
                    return self._ready.pop()
                if not self._asking and not self._exhausted:
                    self._asking = True
                    self._active += 1
                    break
                if not self._active:
                    return None
                self._changed.wait(POLL_SECONDS)  # an error is noted without the lock, so it is looked for
            else:
                return None
        return self._ask()

    def _ask(self) -> Task[State] | None:
        """Return the supply's next task; with the last one gone, whatever comes next."""
        task = next(self._supply, None)
        with self._lock:
            self._asking = False
            self._exhausted = task is None
            self._changed.notify()
        if task is not None:
            return task
        self._finish()
        return self._next()
