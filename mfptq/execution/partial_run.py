"""Convert some of a plan's shards into a folder that other machines write into as well.

Called by `conversion` and, on each node of a cluster, by `cluster.tasks`. Shards depend on nothing but the plan, so no
machine waits for another: a fused group that reaches into other shards has its largest magnitude found again by each part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output.claim import OutputClaim
from ..output.part_destination import open_part
from .engine import Execution
from .events import Advanced, OnEvent
from .memory_budget import peak_bytes
from .prepare import Run

if TYPE_CHECKING:
    from ..output.journal import ShardResult
    from ..planning.jobs import ShardPlan


@dataclass(frozen=True, slots=True)
class PartReport:
    """The outcome of a part. Sizes are in bytes; `shards` are the names of its shards, `resumed` how many were there."""

    source: str
    destination: str
    shards: tuple[str, ...]
    all_shards: int
    resumed: int
    kernel: str
    source_bytes: int
    output_bytes: int
    seconds: float
    peak_memory: int

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def run_shards(
    run: Run,
    destination: Path,
    shards: tuple[ShardPlan, ...],
    on_event: OnEvent,
    *,
    on_done: Callable[[dict[str, ShardResult]], object] | None = None,
) -> PartReport:
    """Make some shards of the plan; index, companions and config.json remain for whoever finishes the output.

    `on_done` is given what became of them. Raises what a conversion raises.
    """
    plan = run.plan
    mine = replace(plan, shards=shards)
    names = tuple(shard.name for shard in shards)
    with open_part(destination, OutputClaim.of(plan), names, lambda: on_event(Advanced(0))) as out:
        resumed = len(out.done)
        Execution(mine, out, run.worker_memories()).run(on_event, held_bytes=run.memory.spare)
        if on_done is not None:
            on_done(out.done)
    return PartReport(
        source=str(plan.checkpoint.origin),
        destination=str(destination),
        shards=names,
        all_shards=len(plan.shards),
        resumed=resumed,
        kernel=run.kernel.name,
        source_bytes=sum(plan.checkpoint.shard(name).header.data_bytes for name in names),
        output_bytes=mine.output_bytes,
        seconds=time.monotonic() - run.begun,
        peak_memory=peak_bytes(),
    )
