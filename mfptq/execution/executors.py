"""Say what carries out a plan: worker threads of this process, or whatever else has the method `execute`.

Called by `conversion`. An executor makes every shard that the destination does not have, and records it there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..output.destination import Destination
from ..storage.files import expanded
from .events import OnEvent
from .prepare import Resources, Run

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan

PATHS = {"calibration", "input_scales", "like", "cache_dir", "recipe"}  # decisions that may name files


@dataclass(frozen=True, slots=True)
class Request:
    """What another machine needs to make the same plan; `decisions` are the keywords of `mfptq.plan`."""

    source: str
    decisions: Mapping[str, Any]

    @classmethod
    def of(cls, plan: ConversionPlan, decisions: Mapping[str, Any]) -> Request:
        """Return the request for a plan that these decisions have led to; the token stays here, each machine has its own."""
        origin = plan.checkpoint.origin
        source = f"hf://{origin.repo_id}@{origin.revision}" if origin.repo_id else str(origin.local.absolute())
        kept = {name: value for name, value in decisions.items() if name not in ("token", "revision")}
        if plan.settings.chosen is not None:  # what a target led to: no other machine measures again
            kept["chosen_formats"] = [str(rule) for rule in plan.settings.chosen]
        kept |= {name: _absolute(kept[name]) for name in PATHS & kept.keys()}
        return cls(source, kept)


def _absolute(value: Any) -> Any:
    """Return what names a file that is there as an absolute path: other machines have another current folder."""
    if isinstance(value, str | Path) and (path := expanded(value)).exists():
        return str(path.absolute())
    return value


@dataclass(frozen=True, slots=True)
class Order:
    """A run about to be carried out: `resources` are those of one machine, or of one task on it."""

    run: Run
    request: Request
    resources: Resources


@dataclass(frozen=True, slots=True)
class Executed:
    """How the work was done: seconds by phase, over all of `workers` threads."""

    kernel: str
    reason: str
    timings: Mapping[str, float]
    workers: int


class Executor(Protocol):
    """Carries out a plan, somewhere."""

    @property
    def remote(self) -> bool:
        """Whether other processes do the work: then this one needs neither their device nor their threads."""

    def execute(self, order: Order, out: Destination, on_event: OnEvent) -> Executed:
        """Make every shard of the plan that the destination `out` does not have, and record it there.

        `on_event` is called in this thread, at least once a second. What it raises stops the work and leaves no temporary.
        """


class ThreadExecutor:
    """Worker threads of this process: what `convert` does without another executor."""

    remote = False

    def execute(self, order: Order, out: Destination, on_event: OnEvent) -> Executed:
        """Make every shard of the plan that the destination `out` does not have, and record it there."""
        from .engine import Execution  # a plan, and whoever lets others do the work, start without it

        run = order.run
        memories = run.worker_memories()
        Execution(run.plan, out, memories).run(on_event, held_bytes=run.memory.spare)
        timings: dict[str, float] = defaultdict(float)
        for memory in memories:
            for phase, spent in memory.seconds.items():
                timings[phase] += spent
        return Executed(run.kernel.name, run.device_reason, timings, len(memories))
