"""Find out, without writing anything, whether a run would begin: device, memory, threads, output folder, free disk.

Called by `plan` and `convert --dry-run`. Raises what the run itself would raise before its first byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.window import AHEAD_BYTES
from ..output.destination import examine
from ..output.finished import is_finished
from ..output.leftovers import OutputClaim
from ..storage.files import expanded
from .prepare import Resources, prepare
from .reading_order import bytes_to_fetch, largest_group

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan


@dataclass(frozen=True, slots=True)
class OutputPreview:
    """An output folder before a run: bytes that it still needs, bytes that are free, shards that need not be made again.

    `complete`: an earlier run has done everything, and a run would only compare every file with its digest.
    """

    path: str
    needed_bytes: int
    free_bytes: int
    finished_shards: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Preview:
    """What a run would use: sizes in bytes, `fetch_bytes` from the Hub, `refetch_bytes` of them a second time."""

    kernel: str
    device_reason: str
    workers: int
    peak_memory: int
    fetch_bytes: int
    refetch_bytes: int
    output: OutputPreview | None = None

    def values(self) -> dict[str, Any]:
        """Return it as JSON values, the output's only where there is one."""
        from dataclasses import asdict

        found = asdict(self)
        return found if self.output is not None else {name: found[name] for name in found if name != "output"}


def preview(
    plan: ConversionPlan,
    resources: Resources,
    destination: str | Path | None = None,
    *,
    overwrite: bool = False,
    held: int = 0,
) -> Preview:
    """Return what a run would use and find, with an output folder if one is named; `held` as in `prepare`.

    Raises UsageError, MemoryBudgetError, DestinationError and its subclasses, StorageError.
    """
    run = prepare(plan, resources, held)
    spare, remote = run.memory.spare, plan.checkpoint.source.is_remote
    fetch = bytes_to_fetch(plan, spare) if remote else 0
    window = min(spare, max(AHEAD_BYTES, largest_group(plan, spare))) if remote else 0
    return Preview(
        kernel=run.kernel.name,
        device_reason=run.device_reason,
        workers=run.memory.workers,
        peak_memory=run.memory.peak + window,
        fetch_bytes=fetch,
        refetch_bytes=max(0, fetch - plan.checkpoint.tensor_bytes),
        output=None if destination is None else _look_at(plan, expanded(destination), overwrite=overwrite),
    )


def _look_at(plan: ConversionPlan, root: Path, *, overwrite: bool) -> OutputPreview:
    if not overwrite and is_finished(plan, root):
        return OutputPreview(str(root), 0, 0, len(plan.shards), complete=True)
    claim = OutputClaim.of(plan)
    found = examine(root, claim, overwrite=overwrite)
    return OutputPreview(str(root), found.needed, found.free, len(found.state.done), complete=False)
