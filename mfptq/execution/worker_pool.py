"""Run tasks on threads: of several lazy supplies, each with its follow-ups first, the newest before all others.

Called by `execution.engine` and `execution.format_errors`. Knows nothing of what a task does. Kernels, reads and writes
release the interpreter's lock, so threads are enough. A task is small (one tile), so that the last tensor is never one
worker's alone; follow-ups come first, so that what was just read is used while it is in the page cache. A worker turns to the
supply that has the fewest tasks under way, so that the tasks of each end in their order, mostly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from .events import Advanced, Event, OnEvent, ignore

State = TypeVar("State")
Task = Callable[[State], None]
POLL_SECONDS = 0.1
_active = attrgetter("active")


@dataclass(slots=True)
class _Supply(Generic[State]):
    """Tasks to come, their follow-ups, and how many workers run one of them or ask for one, so that more may still come."""

    tasks: Iterator[Task[State]]
    ready: list[Task[State]] = field(default_factory=list)
    asking: bool = False  # a generator cannot be asked twice at once
    exhausted: bool = False
    active: int = 0

    @property
    def has_work(self) -> bool:
        """Whether a worker may turn to it."""
        return bool(self.ready) or not (self.asking or self.exhausted)


class WorkerPool(Generic[State]):
    """Threads, one for each state, that run tasks until the supplies are exhausted and every follow-up is done.

    Threads: `add` from tasks, `emit` from tasks and supplies, `run` from the caller. `_lock` guards the supplies. The calling
    thread takes no lock: an exception that a signal raises in it cannot leave one taken. It learns everything from `_events`.
    """

    def __init__(self, supplies: Iterable[Iterator[Task[State]]], states: Sequence[State]) -> None:
        self._supplies = [_Supply(tasks) for tasks in supplies]
        self._states = states
        self._own = threading.local()  # `supply`: whose task a worker runs
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._events: SimpleQueue[Event | None] = SimpleQueue()  # None: a worker has ended
        self._begun: list[
            int
        ] = []  # one entry for each worker that runs, or has run; its length is read without a lock
        self._started = self._ended = 0  # the calling thread's own

    def add(self, tasks: Iterable[Task[State]]) -> None:
        """Add follow-ups of the task that calls this; they run in the given order, before what its supply yields."""
        added = list(tasks)
        with self._lock:
            self._own.supply.ready.extend(reversed(added))
            self._changed.notify(len(added))

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
            self._own.supply.active -= 1
            if not any(each.active for each in self._supplies):
                self._changed.notify_all()

    def _next(self) -> Task[State] | None:
        """Return the next task, waiting for one if others may still add some; None when all is done or failed."""
        while not self._error:
            with self._lock:
                supply = min((each for each in self._supplies if each.has_work), key=_active, default=None)
                if supply is None:
                    if not any(each.active for each in self._supplies):
                        return None
                    self._changed.wait(POLL_SECONDS)  # an error is noted without the lock, so it is looked for
                    continue
                self._own.supply = supply
                supply.active += 1
                if supply.ready:
                    return supply.ready.pop()
                supply.asking = True
            task = self._ask(supply)
            if task is not None:
                return task
            self._finish()
        return None

    def _ask(self, supply: _Supply[State]) -> Task[State] | None:
        """Return a supply's next task, or None at its end."""
        task = next(supply.tasks, None)
        with self._lock:
            supply.asking = False
            supply.exhausted = task is None
            self._changed.notify()
        return task
