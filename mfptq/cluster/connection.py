"""Talk to a running Ray cluster: which nodes can take a task, submit, wait, cancel. The only module that imports ray.

Called by the other modules of `cluster`. Never starts a cluster, and leaves one that the caller uses connected.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError, counted, quote
from ..sizes import size_text

Answer = dict[str, Any]
Ref = Any  # what Ray gives for a result to come
CANCEL_SECONDS = 5
CONNECT_SECONDS = 10
_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}


class TaskLostError(Exception):
    """A task ended without an answer: its process, its node or the memory it needs is gone."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that can take `slots` tasks at a time."""

    key: str
    name: str
    slots: int


@contextmanager
def connected(address: str | None, needs: Mapping[str, float], max_nodes: int | None) -> Iterator[Cluster]:
    """Lend the cluster at an address; each task takes `needs`, in the words of Ray.

    Raises UsageError where ray is not installed, there is no cluster, or no node of it can take a task.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("ray is not installed: pip install 'mfptq[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        address = address or os.environ.get("RAY_ADDRESS")
        try:
            _knock(address)
            ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"no Ray cluster at {quote(address or 'auto')}: {str(error).strip().splitlines()[0]}"
            ) from None
    try:
        cluster = Cluster(ray, dict(needs), max_nodes)
        cluster.check()
        yield cluster
    finally:
        if ours:
            ray.shutdown()


def _knock(address: str | None) -> None:
    """Raise OSError where nothing listens at a head's address: Ray itself would wait for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


def _here(function: Callable[..., Answer], *arguments: Any) -> tuple[str, Answer]:
    """Run on a node: return the node's key in the cluster and what a function returns."""
    import ray

    return ray.get_runtime_context().get_node_id(), function(*arguments)


class Cluster:
    """A cluster that is connected. For one thread."""

    def __init__(self, ray: Any, needs: dict[str, float], max_nodes: int | None) -> None:
        self._ray = ray
        self._needs = needs
        self._max_nodes = max_nodes
        self._names: dict[str, str] = {}

    def check(self) -> None:
        """Raise UsageError if no node can ever take a task: Ray would wait for one, silently."""
        if self.nodes():
            return
        alive = sum(node["Alive"] for node in self._ray.nodes())
        amounts = [
            counted(int(self._needs[name]), word, f"{word}s") for name, word in _NAMES.items() if name != "memory"
        ]
        wanted = f"{', '.join(amounts)} and {size_text(int(self._needs['memory']))}"
        raise UsageError(f"none of {counted(alive, 'node', 'nodes')} has {wanted} for a task: ask for less")

    def nodes(self) -> list[Node]:
        """Return the living nodes that can take a task, those that take most first."""
        found = []
        for node in self._ray.nodes():
            has, host, address = node["Resources"], node["NodeManagerHostname"], node["NodeManagerAddress"]
            slots = min(
                (int(has.get(_NAMES[name], 0) // size) for name, size in self._needs.items() if size), default=1
            )
            self._names[node["NodeID"]] = host if node["NodeName"] in ("", address) else node["NodeName"]
            if node["Alive"] and slots:
                found.append(Node(node["NodeID"], self._names[node["NodeID"]], slots))
        return sorted(found, key=lambda node: (-node.slots, node.key))

    def share_memory(self) -> int:
        """Give each task an equal share of its node's memory, of the node that has least for one; return it, in bytes."""
        slots = {node.key: node.slots for node in self.nodes()}
        has = {node["NodeID"]: node["Resources"].get("memory", 0) for node in self._ray.nodes()}
        self._needs["memory"] = min(int(has[key] // count) for key, count in slots.items())
        return int(self._needs["memory"])

    def window(self) -> int:
        """Return how many tasks may be in flight: what fits into the nodes, or into `max_nodes` of them."""
        return sum(node.slots for node in self.nodes()[: self._max_nodes])

    def name(self, key: str) -> str:
        """Return a node's name."""
        return self._names.get(key, key)

    def put(self, value: object) -> Ref:
        """Store a value once for all tasks."""
        return self._ray.put(value)

    def submit(self, function: Callable[..., Answer], *arguments: Any, avoid: Collection[str] = ()) -> Ref:
        """Begin a task on whatever node has room, none of the nodes `avoid` if there are others.

        It is not retried: whoever waits decides that.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        others = [node.key for node in self.nodes() if node.key not in avoid] if avoid else []
        where = NodeAffinitySchedulingStrategy(secrets.choice(others), soft=True) if others else "SPREAD"
        task = self._ray.remote(_here).options(max_retries=0, scheduling_strategy=where, **self._needs)
        return task.remote(function, *arguments)

    def submit_on(self, node: Node, function: Callable[..., Answer], *arguments: Any) -> Ref:
        """Begin a task on that node, whatever else runs there."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node.key, soft=False)
        return (
            self._ray.remote(_here)
            .options(max_retries=0, num_cpus=0, scheduling_strategy=there)
            .remote(function, *arguments)
        )

    def wait(self, refs: Collection[Ref], seconds: float) -> list[Ref]:
        """Return those that have ended, after `seconds` at the latest."""
        return list(self._ray.wait(list(refs), num_returns=1, timeout=seconds)[0]) if refs else []

    def answer(self, ref: Ref) -> tuple[str, Answer]:
        """Return the node's key and the answer of a task that has ended; raises TaskLostError where there is none."""
        errors = self._ray.exceptions
        try:
            key, answer = self._ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ImportError):
                raise UsageError(f"a node cannot import mfptq: {quote(error.cause)}") from None
            raise
        except errors.RayError as error:
            raise TaskLostError(type(error).__name__) from None
        self.nodes()
        return str(key), dict(answer)

    def cancel(self, refs: Collection[Ref]) -> None:
        """Stop tasks: they tidy up, and are killed where that takes too long."""
        left = list(refs)
        for ref in left:
            self._ray.cancel(ref, force=False)
        end = time.monotonic() + CANCEL_SECONDS
        while left and time.monotonic() < end:
            _, left = self._ray.wait(left, num_returns=len(left), timeout=0.5)
        for ref in left:
            self._ray.cancel(ref, force=True)
