"""Carry out a plan on a Ray cluster: one task for each shard, or for a few small ones.

Given to `mfptq.convert` or `Plan.run`. Ray schedules; this keeps a window of tasks in flight, checks what they have made, and
is the only one to write the journal. Tasks carry names and settings, no weights. A lost task is begun again; the last ones
are begun twice where a node seems stuck: attempts at one shard are harmless.
"""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import DestinationError, SourceError, UsageError, counted, listed, quote
from ..execution.events import Advanced, OnEvent, Planned, ShardFinished
from ..execution.executors import Executed, Order
from ..execution.memory_budget import INTERPRETER
from ..output.journal import ShardResult
from ..planning.jobs import ShardPlan, largest_first
from ..sizes import parse_size
from ..storage.files import open_regular
from .connection import Answer, Cluster, TaskLostError, connected
from .probing import error_of, probe_nodes

if TYPE_CHECKING:
    from ..output.destination import Destination
    from ..planning.plan import ConversionPlan

logger = logging.getLogger(__name__)

ATTEMPTS = 4  # at one task, before the fault is taken for the task's own
POLL_SECONDS = 0.2
SEEN_SECONDS = 60  # so much later a shared file system may show a finished file
STUCK = 2.0  # a task that has taken so many times the median is begun a second time when nothing else is left
STUCK_SECONDS = 10.0  # and at least so long
AGAIN = {"StorageError", "MemoryBudgetError"}  # answers that another attempt may better
Shards = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RayExecutor:
    """A Ray cluster that is running already; each task has `cpus_per_task` threads and a `max_memory` of its own.

    `address` is that of the cluster's head; by default what RAY_ADDRESS says, or the cluster that this machine is part of.
    `max_nodes` bounds how many nodes' worth of tasks are in flight. With `gpus_per_task`, tasks quantize on a GPU. Shards of
    together at most `task_bytes` of source share a task. Source and output must have one path on all nodes.
    """

    address: str | None = None
    max_nodes: int | None = None
    cpus_per_task: int = 4
    gpus_per_task: int = 0
    task_bytes: int = 2**28
    remote: ClassVar[bool] = True

    def __post_init__(self) -> None:
        least = {"max_nodes": 1, "cpus_per_task": 1, "gpus_per_task": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UsageError(f"{name} is {value}, expected at least {bound}")

    def execute(self, order: Order, out: Destination, on_event: OnEvent) -> Executed:
        """Make every shard of the plan that the destination `out` does not have, and record it there.

        Raises UsageError where there is no cluster or no node for a task, and a node's own errors with the node's name.
        """
        needs = {
            "num_cpus": self.cpus_per_task,
            "num_gpus": self.gpus_per_task,
            "memory": parse_size(order.resources.max_memory) + INTERPRETER,
        }
        resources = {
            "max_memory": order.resources.max_memory,
            "max_workers": order.resources.max_workers or self.cpus_per_task,
            "device": self._device(order.resources.device),
        }
        plan = order.run.plan
        on_event(Planned(plan.checkpoint.tensor_bytes))
        for name in [shard.name for shard in plan.shards if shard.name in out.done]:
            on_event(Advanced(plan.checkpoint.shard(name).header.data_bytes))
            on_event(ShardFinished(name, resumed=True))
        with connected(self.address, needs, self.max_nodes) as cluster:
            arguments = (cluster.put(pickle.dumps(order.request)), dict(plan.digests), str(out.root.absolute()))
            probe_nodes(cluster, arguments, out, lambda: on_event(Advanced(0)))
            run = RayRun(cluster, plan, out, on_event)
            run.finish_all(grouped(plan, out.done, self.task_bytes), arguments, resources)
        kernel = " and ".join(sorted(run.kernels)) or order.run.kernel.name
        return Executed(kernel, f"Ray, {counted(len(run.nodes), 'node', 'nodes')}", {"tasks": run.seconds}, 0)

    def _device(self, device: str) -> str:
        """Return where a task quantizes: Ray shows it no GPU but its own."""
        if self.gpus_per_task:
            return "auto" if device == "auto" else "cuda"
        if device.startswith("cuda"):
            raise UsageError(f"device {device} needs gpus_per_task of at least 1")
        return "cpu"


def grouped(plan: ConversionPlan, done: Collection[str], task_bytes: int) -> list[Shards]:
    """Return the shards that are left, as tasks take them, large ones first; neighbours share a task if they are small."""
    groups: list[list[ShardPlan]] = []
    room = 0
    for shard in [shard for shard in largest_first(plan.shards) if shard.name not in done]:
        size = plan.checkpoint.shard(shard.name).header.data_bytes
        if not groups or size > room:
            groups.append([])
            room = task_bytes
        groups[-1].append(shard)
        room -= size
    return [tuple(shard.name for shard in group) for group in groups]


@dataclass(slots=True)
class _Attempt:
    """An attempt at some shards, begun at `begun`, in seconds of a monotonic clock."""

    shards: Shards
    begun: float


class RayRun:
    """The tasks of one run. For one thread."""

    def __init__(self, cluster: Cluster, plan: ConversionPlan, out: Destination, on_event: OnEvent) -> None:
        self.nodes: set[str] = set()
        self.kernels: set[str] = set()
        self.seconds = 0.0
        self._cluster = cluster
        self._plan = plan
        self._out = out
        self._tell = on_event
        self._running: dict[Any, _Attempt] = {}
        self._superseded: list[Any] = []
        self._failures: Counter[Shards] = Counter()
        self._took: list[float] = []

    def finish_all(self, todo: list[Shards], arguments: tuple[Any, ...], resources: dict[str, Any]) -> None:
        """Run everything; raise the first error that another attempt cannot better. No task runs after this returns."""
        from .tasks import make

        todo = todo[::-1]
        try:
            while todo or self._running:
                room = self._cluster.window() - len(self._running)
                if room < 1 and not self._running:
                    raise DestinationError("no node of the cluster is left that can take a task; rerun to resume")
                for shards in [todo.pop() for _ in range(min(room, len(todo)))] or self._stuck(room):
                    ref = self._cluster.submit(make, *arguments, {"shards": shards, "resources": resources})
                    self._running[ref] = _Attempt(shards, time.monotonic())
                for ref in self._cluster.wait(self._running, POLL_SECONDS):
                    todo += self._take(ref)
                self._tell(Advanced(0))
        finally:
            self._cluster.cancel([*self._running, *self._superseded])

    def _stuck(self, room: int) -> list[Shards]:
        """Return what deserves a second attempt, since it takes much longer than the others and there is room."""
        if room < 1 or not self._took:
            return []
        late = time.monotonic() - max(STUCK * median(self._took), STUCK_SECONDS)
        attempts = Counter(attempt.shards for attempt in self._running.values())
        found = [each.shards for each in self._running.values() if each.begun < late and attempts[each.shards] == 1]
        return found[:room]

    def _take(self, ref: Any) -> list[Shards]:
        """Take in a task that has ended; return what must be done again."""
        attempt = self._running.pop(ref, None)
        if attempt is None:
            return []  # a second attempt that the first has made needless
        try:
            key, answer = self._cluster.answer(ref)
        except TaskLostError as lost:
            return self._again(
                attempt.shards, DestinationError(f"the task for {listed(attempt.shards)} was lost: {lost}")
            )
        node = self._cluster.name(key)
        if not answer["ok"]:
            error = error_of(node, answer)
            if answer["error"] not in AGAIN:
                raise error
            return self._again(attempt.shards, error)
        for result in answer["results"]:
            self._record(node, ShardResult(**result))
        self._note(key, attempt, answer)
        return []

    def _again(self, shards: Shards, error: Exception) -> list[Shards]:
        """Return the shards for another attempt, or raise when there were enough."""
        self._failures[shards] += 1
        logger.warning("attempt %d at %s failed: %s", self._failures[shards], listed(shards), error)
        if self._failures[shards] >= ATTEMPTS:
            raise error
        return [] if any(each.shards == shards for each in self._running.values()) else [shards]

    def _note(self, key: str, attempt: _Attempt, answer: Answer) -> None:
        """Note how a task went, and stop a second attempt at the same."""
        self.nodes.add(key)
        self.kernels.add(answer["kernel"])
        self.seconds += answer["seconds"]
        self._took.append(time.monotonic() - attempt.begun)
        others = [ref for ref, each in self._running.items() if each.shards == attempt.shards]
        for ref in others:
            del self._running[ref]
        self._superseded += others

    def _record(self, node: str, result: ShardResult) -> None:
        """Record a shard that a node has finished, once it is seen here with its size."""
        self._await(node, result)
        self._out.record(result)
        logger.info("node %s finished %s", node, quote(result.name))
        self._tell(Advanced(self._plan.checkpoint.shard(result.name).header.data_bytes))
        self._tell(ShardFinished(result.name))

    def _await(self, node: str, result: ShardResult) -> None:
        [planned] = [shard.size for shard in self._plan.shards if shard.name == result.name]
        end = time.monotonic() + SEEN_SECONDS
        while _size(self._out, result.name) != planned or result.size != planned:
            if time.monotonic() > end:
                raise DestinationError(
                    f"node {quote(node)} has finished {quote(result.name)}, but it is not seen here with {planned} bytes: "
                    "the output must be shared"
                )
            self._tell(Advanced(0))
            time.sleep(POLL_SECONDS)


def _size(out: Destination, name: str) -> int:
    """Return the size of a shard as it is seen here, -1 where it is not."""
    try:
        fd = open_regular(out.root / name)
    except SourceError:
        return -1
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)
