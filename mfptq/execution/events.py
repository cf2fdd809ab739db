"""Events of a run, delivered in the thread that called `convert` or `Plan.run`.

Made by `execution` and `comparison`, taken by the caller's `on_event`. Data only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Planned:
    """The run begins: the source's tensors have `total_bytes` bytes."""

    total_bytes: int


@dataclass(frozen=True, slots=True)
class Advanced:
    """Another `source_bytes` bytes of the source are converted; 0 says only that the run is alive."""

    source_bytes: int


@dataclass(frozen=True, slots=True)
class ShardFinished:
    """The output shard `name` is durable; `resumed`: an earlier run had finished it."""

    name: str
    resumed: bool = False


Event = Planned | Advanced | ShardFinished
OnEvent = Callable[[Event], object]


def ignore(_event: object) -> None:
    """Take no notice of an event, or do nothing as a task."""
