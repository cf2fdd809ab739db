"""Carry out a plan on a Ray cluster: one task for each shard, or for a few small ones.

Given to `mfptq.convert` or `Plan.run`. Ray schedules; this keeps a window of tasks in flight, checks what they have made, and
is the only one to write the journal. Tasks carry names and settings, no weights. A lost task is begun again; the last ones
are begun twice where a node seems stuck: attempts at one shard are harmless.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import SourceError, UsageError, counted, quote
from ..execution.events import Advanced, OnEvent, Planned, ShardFinished
from ..execution.executors import Executed, Order
from ..execution.memory_budget import INTERPRETER
from ..output.journal import ShardResult
from ..planning.jobs import ShardPlan, largest_first
from ..sizes import parse_size
from ..storage.files import open_regular
from .attempts import Names, TaskLoop, await_file
from .connection import Answer, Cluster, Ref, connected
from .probing import probe_nodes

if TYPE_CHECKING:
    from ..observation.calibration_parts import CalibrationOrder, PartsFolder
    from ..observation.calibration_pass import OnProgress
    from ..output.destination import Destination
    from ..planning.plan import ConversionPlan

logger = logging.getLogger(__name__)

PASSING = frozenset({"StorageError", "MemoryBudgetError"})  # errors that another attempt may better


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
            probe_nodes(cluster, arguments[:2], out.root, lambda: on_event(Advanced(0)))
            run = RayRun(cluster, plan, out, on_event)
            loop = run.finish_all(grouped(plan, out.done, self.task_bytes), arguments, resources)
        kernel = " and ".join(sorted(run.kernels)) or order.run.kernel.name
        return Executed(kernel, f"Ray, {counted(len(loop.nodes), 'node', 'nodes')}", {"tasks": loop.seconds}, 0)

    def calibrate(self, order: CalibrationOrder, folder: PartsFolder, on_event: OnProgress) -> None:
        """Make every part of a calibration that is not whole, a task for each; see `mfptq.calibrate`.

        Without `max_memory`, the tasks that fit on a node share its memory.
        """
        from .calibrating import CalibrationRun

        asked = order.options
        device = self._device(asked.device) if asked.device.startswith("cuda") or self.gpus_per_task else asked.device
        memory = 0 if asked.max_memory is None else parse_size(asked.max_memory)
        needs = {"num_cpus": self.cpus_per_task, "num_gpus": self.gpus_per_task, "memory": memory}
        with connected(self.address, needs, self.max_nodes) as cluster:
            resources = {
                "device": device,
                "threads": self.cpus_per_task,
                "max_memory": memory or cluster.share_memory(),
            }
            CalibrationRun(cluster, order, folder, on_event).make_all(resources)

    def _device(self, device: str) -> str:
        """Return where a task quantizes: Ray shows it no GPU but its own."""
        if self.gpus_per_task:
            return "auto" if device == "auto" else "cuda"
        if device.startswith("cuda"):
            raise UsageError(f"device {device} needs gpus_per_task of at least 1")
        return "cpu"


def grouped(plan: ConversionPlan, done: Collection[str], task_bytes: int) -> list[Names]:
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


class RayRun:
    """The tasks of one run. For one thread."""

    def __init__(self, cluster: Cluster, plan: ConversionPlan, out: Destination, on_event: OnEvent) -> None:
        self.kernels: set[str] = set()
        self._cluster = cluster
        self._plan = plan
        self._out = out
        self._tell = on_event

    def finish_all(self, todo: list[Names], arguments: tuple[Any, ...], resources: dict[str, Any]) -> TaskLoop:
        """Run everything and return the loop that did; raise the first error that another attempt cannot better."""
        from .tasks import make

        def begin(shards: Names, avoid: Collection[str]) -> Ref:
            return self._cluster.submit(make, *arguments, {"shards": shards, "resources": resources}, avoid=avoid)

        loop = TaskLoop(
            self._cluster, begin, self._take, self._poll, passing=PASSING, twice=True, has_room=self._out.has_room
        )
        loop.finish_all(todo)
        return loop

    def _poll(self) -> None:
        """Let the caller stop the run; nothing has advanced."""
        self._tell(Advanced(0))

    def _take(self, node: str, answer: Answer) -> None:
        """Take in what a task has made."""
        self.kernels.add(answer["kernel"])
        for result in answer["results"]:
            self._record(node, ShardResult(**result))

    def _record(self, node: str, result: ShardResult) -> None:
        """Record a shard that a node has finished, once it is seen here with its size."""
        [planned] = [shard.size for shard in self._plan.shards if shard.name == result.name]
        await_file(node, result.name, lambda: _size(self._out, result.name) == planned == result.size, self._poll)
        self._out.record(result)
        logger.info("node %s finished %s", node, quote(result.name))
        self._tell(Advanced(self._plan.checkpoint.shard(result.name).header.data_bytes))
        self._tell(ShardFinished(result.name))


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
