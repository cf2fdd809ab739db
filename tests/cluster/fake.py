"""A cluster made of Python: tasks run in this process when they are waited for, and are lost on demand."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from mfptq.cluster.connection import Node


class FakeCluster:
    """Tasks end when they are waited for, the oldest first; `break_` decides what becomes of an attempt."""

    def __init__(self, slots: int = 2, names: tuple[str, ...] = ("red", "blue")) -> None:
        self.slots = slots
        self.names = names
        self.submitted: list[tuple[str, ...]] = []
        self.avoided: list[set[str]] = []
        self.most = 0
        self.left: list[Any] = []
        self.break_: Callable[[int, tuple[str, ...]], dict[str, Any] | Exception | None] = lambda _number, _shards: None
        self.held: set[int] = set()  # numbers of tasks that never end
        self._tasks: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
        self._numbers = itertools.count(1)

    def put(self, value: object) -> object:
        return value

    def nodes(self) -> list[Node]:
        return [Node(name, name, self.slots) for name in self.names]

    def window(self) -> int:
        return self.slots * len(self.names)

    def name(self, key: str) -> str:
        return key

    def submit(self, function: Callable[..., Any], *arguments: Any, avoid: Collection[str]) -> int:
        self.avoided.append(set(avoid))
        number = next(self._numbers)
        self._tasks[number] = pickle.loads(pickle.dumps((function, arguments)))
        self.submitted.append(_names(arguments))
        self.most = max(self.most, len(self._tasks))
        return number

    def submit_on(self, node: Node, function: Callable[..., Any], *arguments: Any) -> int:
        number = next(self._numbers)
        self._tasks[number] = (function, arguments)
        return number

    def wait(self, refs: Any, _seconds: float) -> list[int]:
        return [ref for ref in refs if ref not in self.held][:1]

    def answer(self, ref: int) -> tuple[str, dict[str, Any]]:
        function, arguments = self._tasks.pop(ref)
        if isinstance(arguments[-1], dict):
            broken = self.break_(len(self.submitted), _names(arguments))
            if isinstance(broken, Exception):
                raise broken
            if broken is not None:
                return "red", broken
        return self.names[ref % len(self.names)], function(*arguments)

    def cancel(self, refs: Any) -> None:
        self.left += refs

    def share_memory(self) -> int:
        return 2**34


def _names(arguments: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the names of the files that a task makes."""
    job = next(each for each in arguments if isinstance(each, dict) and each.keys() & {"shards", "path"})
    return job["shards"] if "shards" in job else (Path(job["path"]).name,)
