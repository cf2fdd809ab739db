"""Find out, without writing anything, whether a run would begin: device, memory, threads, output folder, free disk.

Called by `plan` and `convert --dry-run`. Raises what the run itself would raise before its first byte.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..hub.window import AHEAD_BYTES
from ..kernels import QuantizeArgs, load_kernel
from ..output.claim import OutputClaim
from ..output.destination import examine
from ..output.finished import is_finished
from ..output.publish import Publisher
from ..output.uploads import SHARDS_AT_ONCE, publishable
from .output_target import Target
from .prepare import Resources, prepare
from .reading_order import bytes_to_fetch, largest_group

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan

MEASURED_BYTES = 8 * 2**20  # of BF16 values, which are quantized again and again
MEASURED_SECONDS = 0.5


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
class Estimates:
    """What to measure: half a second of computing, a second of fetching."""

    computing: bool = False
    fetching: bool = False


@dataclass(frozen=True, slots=True)
class Preview:
    """What a run would use: sizes in bytes, `fetch_bytes` from the Hub, `refetch_bytes` of them a second time.

    `computing_seconds` on these cores, and `fetch_rate` in bytes per second, are None where they were not measured; fetching
    and computing overlap. `disk_bytes` is the size of the whole output.
    """

    kernel: str
    device_reason: str
    workers: int
    peak_memory: int
    fetch_bytes: int
    refetch_bytes: int
    disk_bytes: int = 0
    computing_seconds: float | None = None
    fetch_rate: float | None = None
    output: OutputPreview | None = None

    def values(self) -> dict[str, Any]:
        """Return it as JSON values, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def preview(
    plan: ConversionPlan,
    resources: Resources,
    target: Target | None = None,
    *,
    held: int = 0,
    estimates: Estimates | None = None,
) -> Preview:
    """Return what a run would use and find, with the output if a `target` names one; `held` as in `prepare`.

    Raises UsageError, MemoryBudgetError, DestinationError and its subclasses, StorageError, HubError.
    """
    run, source, estimates = prepare(plan, resources, held), plan.checkpoint.source, estimates or Estimates()
    spare, remote = run.memory.spare, source.is_remote
    fetch = bytes_to_fetch(plan, spare) if remote else 0
    window = min(spare, max(AHEAD_BYTES, largest_group(plan, spare))) if remote else 0
    return Preview(
        kernel=run.kernel.name,
        device_reason=run.device_reason,
        workers=run.memory.workers,
        peak_memory=run.memory.peak + window,
        fetch_bytes=fetch,
        refetch_bytes=max(0, fetch - plan.checkpoint.tensor_bytes),
        disk_bytes=plan.output_bytes,
        computing_seconds=_computing_seconds(plan, run.memory.workers) if estimates.computing else None,
        fetch_rate=source.rate() if estimates.fetching else None,
        output=None if target is None else _look_at(plan, target),
    )


def _look_at(plan: ConversionPlan, target: Target) -> OutputPreview:
    target.check()
    root = target.root
    if not target.overwrite and is_finished(plan, root):
        return OutputPreview(str(root), 0, 0, len(plan.shards), complete=True)
    if target.push_to is not None:
        publishable(Publisher(root, target.push_to), plan.digest)
    claim = OutputClaim.of(plan)
    if target.discard:
        claim = replace(claim, at_once=SHARDS_AT_ONCE)
    found = examine(root, claim, overwrite=target.overwrite)
    return OutputPreview(str(root), found.needed, found.free, len(found.state.done), complete=False)


def _computing_seconds(plan: ConversionPlan, workers: int) -> float:
    """Return how long computing will take on these cores, from half a second of quantizing; reading is not counted."""
    methods = plan.methods
    method = methods.most_common(1)[0][0] if methods else "minmax"
    measured = method if method in ("search", "minmax") else "search"
    kernel, rows = load_kernel("cpu"), MEASURED_BYTES // 2 // 4096
    tile = np.full((rows, 4096), 0x3C23, np.uint16)  # BF16 of one value: times do not depend on values
    packed, scales = np.empty((rows, 2048), np.uint8), np.empty((rows, 256), np.uint8)
    kernel.quantize(tile, QuantizeArgs(measured, 1.0), packed, scales)
    begun, done = time.monotonic(), 0
    while time.monotonic() - begun < MEASURED_SECONDS:
        kernel.quantize(tile, QuantizeArgs(measured, 1.0), packed, scales)
        done += tile.size
    speed = done / (time.monotonic() - begun)
    return sum(weight.size for weight in plan.weights()) / speed / max(1, workers)
