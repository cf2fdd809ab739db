"""Keep a window of tasks in flight until every one has been answered: begin again what was lost, twice what is stuck.

Called by `cluster.ray_executor` for shards and by `cluster.calibrating` for parts of a calibration. What a task makes it is
told by names; how it is begun, and what its answer means, the caller says.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeAlias

from ..errors import DestinationError, listed, quote
from .connection import Answer, Cluster, Ref, TaskLostError
from .probing import error_of

logger = logging.getLogger(__name__)

ATTEMPTS = 4  # at one task, before the fault is taken for the task's own
POLL_SECONDS = 0.2
SEEN_SECONDS = 60  # so much later a shared file system may show a finished file
STUCK = 2.0  # a task that has taken so many times the median is begun a second time when nothing else is left
STUCK_SECONDS = 10.0  # and at least so long
Names: TypeAlias = tuple[str, ...]  # of the files that a task makes


def await_file(node: str, name: str, is_there: Callable[[], bool], poll: Callable[[], object]) -> None:
    """Return when a file that a node has finished is seen here; a shared file system may show it late.

    Raises DestinationError where it is not seen in time, and what `poll`, called often, raises meanwhile.
    """
    end = time.monotonic() + SEEN_SECONDS
    while not is_there():
        if time.monotonic() > end:
            raise DestinationError(
                f"node {quote(node)} has finished {quote(name)}, but it is not seen here whole: the output must be shared"
            )
        poll()
        time.sleep(POLL_SECONDS)


@dataclass(slots=True)
class _Attempt:
    """An attempt at some files, begun at `begun`, in seconds of a monotonic clock."""

    names: Names
    begun: float


@dataclass(slots=True)
class TaskLoop:
    """The tasks of one run. For one thread.

    `begin` begins an attempt, not on the nodes whose keys it is given, where others have failed; `record` takes in the name of
    a node and its answer; `poll` is called often, and what it raises ends the run. `passing` are the errors, by class name,
    that another attempt may better. `twice`: two attempts at once are harmless. While `has_room` says no, none is begun.
    """

    cluster: Cluster
    begin: Callable[[Names, Collection[str]], Ref]
    record: Callable[[str, Answer], object]
    poll: Callable[[], object]
    passing: frozenset[str]
    twice: bool
    has_room: Callable[[], bool] = lambda: True
    nodes: set[str] = field(default_factory=set)
    seconds: float = 0.0
    _running: dict[Ref, _Attempt] = field(default_factory=dict)
    _superseded: list[Ref] = field(default_factory=list)
    _failures: Counter[Names] = field(default_factory=Counter)
    _avoid: defaultdict[Names, set[str]] = field(default_factory=lambda: defaultdict(set))
    _took: list[float] = field(default_factory=list)

    def finish_all(self, every: Sequence[Names]) -> None:
        """Run everything; raise the first error that another attempt cannot better. No task runs after this returns."""
        todo = list(every)[::-1]
        try:
            while todo or self._running:
                room = self.cluster.window() - len(self._running)
                if room < 1 and not self._running:
                    raise DestinationError("no node of the cluster is left that can take a task; rerun to resume")
                room = room if self.has_room() else 0
                for names in [todo.pop() for _ in range(min(room, len(todo)))] or self._stuck(room):
                    self._running[self.begin(names, self._avoid[names])] = _Attempt(names, time.monotonic())
                for ref in self.cluster.wait(self._running, POLL_SECONDS):
                    todo += self._take(ref)
                self.poll()
        finally:
            self.cluster.cancel([*self._running, *self._superseded])

    def _stuck(self, room: int) -> list[Names]:
        """Return what deserves a second attempt, since it takes much longer than the others and there is room."""
        if room < 1 or not self.twice or not self._took:
            return []
        late = time.monotonic() - max(STUCK * median(self._took), STUCK_SECONDS)
        attempts = Counter(attempt.names for attempt in self._running.values())
        found = [each.names for each in self._running.values() if each.begun < late and attempts[each.names] == 1]
        return found[:room]

    def _take(self, ref: Any) -> list[Names]:
        """Take in a task that has ended; return what must be done again."""
        attempt = self._running.pop(ref, None)
        if attempt is None:
            return []  # a second attempt that the first has made needless
        try:
            key, answer = self.cluster.answer(ref)
        except TaskLostError as lost:
            error = DestinationError(f"the task for {listed(attempt.names)} was lost: {lost}")
            return self._again(attempt.names, error)
        node = self.cluster.name(key)
        if not answer["ok"]:
            said = error_of(node, answer)
            if answer["error"] not in self.passing:
                raise said
            self._avoid[attempt.names].add(key)
            return self._again(attempt.names, said)
        self.record(node, answer)
        self._note(key, attempt, answer)
        return []

    def _again(self, names: Names, error: Exception) -> list[Names]:
        """Return the names for another attempt, or raise when there were enough."""
        self._failures[names] += 1
        logger.warning("attempt %d at %s failed: %s", self._failures[names], listed(names), error)
        if self._failures[names] >= ATTEMPTS:
            raise error
        return [] if any(each.names == names for each in self._running.values()) else [names]

    def _note(self, key: str, attempt: _Attempt, answer: Answer) -> None:
        """Note how a task went, and stop a second attempt at the same."""
        self.nodes.add(key)
        self.seconds += answer["seconds"]
        self._took.append(time.monotonic() - attempt.begun)
        others = [ref for ref, each in self._running.items() if each.names == attempt.names]
        for ref in others:
            del self._running[ref]
        self._superseded += others
