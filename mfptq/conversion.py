"""Convert a checkpoint: read headers, plan, claim the output, run, finish with config.json.

The two public functions, `plan` and `convert`, and the object between them. Nothing is written before the plan stands.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint.hub import HubOptions, open_checkpoint
from .errors import counted
from .execution.engine import Execution
from .execution.events import Advanced, Event, OnEvent
from .execution.memory_budget import INTERPRETER, memory_errors, peak_bytes, resident_bytes
from .execution.prepare import Resources, Run, prepare
from .execution.worker_memory import WorkerMemory
from .output.destination import Destination, open_destination
from .output.finish import finish, source_card
from .output.leftovers import OutputClaim
from .output.model_card import card_metadata, card_text
from .output.report import Report, gather, pattern_reports, suspicions, total_error
from .planning.plan import ConversionPlan, PlannedTensor, build_plan
from .planning.settings import Decisions, check_decisions
from .scales.reading import InputScales, read_input_scales
from .sizes import size_text
from .storage.files import expanded

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Plan:
    """What a conversion will do; `run` does it. For one thread.

    It holds the source's files open: use it in a `with` block, or call `close`.
    """

    def __init__(self, planned: ConversionPlan, held: int = 0) -> None:
        self._planned = planned
        self._held = held  # bytes that the process held before: the caller's own
        self.source_bytes = planned.checkpoint.tensor_bytes
        self.output_bytes = planned.tensor_bytes
        self.scheme = planned.scheme
        self.left_out = planned.checkpoint.left_out  # names of files that are neither converted nor copied

    def __repr__(self) -> str:
        weights = counted(sum(self.methods.values()), "weight", "weights")
        what = "W4A4" if self.scheme == "NVFP4" else "W4A16"
        sizes = f"{size_text(self.source_bytes)} -> {size_text(self.output_bytes)}"
        return f"Plan: {weights} to NVFP4 ({what}), {sizes}, {counted(len(self._planned.shards), 'shard', 'shards')}"

    @property
    def methods(self) -> Mapping[str, int]:
        """How many weights each method quantizes."""
        return self._planned.methods

    @property
    def warnings(self) -> tuple[str, ...]:
        """What deserves a second look, one line each."""
        return self._planned.warnings

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """Every source tensor with its action, the rule that decided, and the reason."""
        return self._planned.tensors

    def run(
        self,
        destination: str | Path,
        *,
        max_memory: str | int = "1GiB",
        max_workers: int | None = None,
        device: str = "cpu",
        overwrite: bool = False,
        on_event: OnEvent | None = None,
    ) -> Report:
        """Carry the plan out into a folder, and return what was done; see `convert`."""
        with memory_errors():
            run = prepare(self._planned, Resources(max_memory, max_workers, device), self._held)
            return _carry_out(run, expanded(destination), overwrite=overwrite, on_event=on_event or _ignore)

    def close(self) -> None:
        """Close the source's files and the calibration file."""
        self._planned.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def plan(source: str | Path, **decisions: Unpack[Decisions]) -> Plan:
    """Return what `convert` with the same decisions would do, from headers alone; raises what it would raise.

    The decisions are the keywords that `Decisions` describes. Close the plan, or use it in a `with` block.
    """
    held = max(0, resident_bytes() - INTERPRETER)
    with memory_errors():
        return Plan(make_plan(source, **decisions), held)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    max_memory: str | int = "1GiB",
    max_workers: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    **decisions: Unpack[Decisions],
) -> Report:
    """Convert a checkpoint to NVFP4 and return what was done.

    `source` is a folder in Hugging Face layout or a Hub repo id, `destination` a folder that does not exist, is empty,
    or holds an unfinished run with the same decisions, which is resumed. The decisions are the keywords that `Decisions`
    describes. `max_memory` is a ceiling for the whole process, in bytes or as "2GB"; what a calling program already holds
    does not count. `max_workers` are threads, one for each core by default. `device` is `cpu`, `cuda[:N]` or `auto`.
    `overwrite` discards an existing output of mfptq. `on_event` is called in this thread with `Planned`, `Advanced`, and
    `ShardFinished`.

    Raises MfptqError and its subclasses; see `mfptq.errors`. The source is only read.
    """
    with plan(source, **decisions) as made:
        return made.run(
            destination,
            max_memory=max_memory,
            max_workers=max_workers,
            device=device,
            overwrite=overwrite,
            on_event=on_event,
        )


def _ignore(_event: Event) -> None:
    """Take no notice of an event."""


def make_plan(source: str | Path, **decisions: Unpack[Decisions]) -> ConversionPlan:
    """Return the plan with everything that the later stages need; `plan` wraps it for the public."""
    settings = check_decisions(decisions)
    hub = HubOptions(decisions.get("revision"), decisions.get("token"), decisions.get("cache_dir"))
    scales, calibration = None, None
    with ExitStack() as opened:
        if (given := decisions.get("input_scales")) is not None:
            scales = given if isinstance(given, InputScales) else read_input_scales(given)
        elif (path := decisions.get("like")) is not None:
            from .scales.sibling import read_sibling

            sibling = read_sibling(path)
            settings = replace(settings, rules=replace(settings.rules, like=sibling))
            scales = sibling.scales
        elif (path := decisions.get("calibration")) is not None:
            from .calibration.reading import load_calibration

            calibration = load_calibration(path)
            opened.callback(calibration.close)
            scales = calibration.input_scales()
        if settings.scheme == "NVFP4A16" and given is None:
            scales = None  # the rest of what `like` or `calibration` tells is of use without them
        checkpoint = open_checkpoint(source, hub)
        opened.callback(checkpoint.source.close)
        made = build_plan(checkpoint, settings, scales, calibration)
        opened.pop_all()
    return made


def _carry_out(run: Run, destination: Path, *, overwrite: bool, on_event: OnEvent) -> Report:
    """Do the work of a run and return its report."""
    plan, memory = run.plan, run.memory
    sizes = {shard.name: shard.size for shard in plan.shards}
    claim = OutputClaim(plan.checkpoint.origin.folder, plan.digests, sizes, plan.checkpoint.companions)
    buffers = [WorkerMemory(run.kernel, memory.tile_bytes, run.calibrated) for _ in range(memory.workers)]
    old_card = source_card(plan.checkpoint.origin.folder)
    with open_destination(destination, claim, overwrite=overwrite, poll=lambda: on_event(Advanced(0))) as out:
        resumed = len(out.done)
        Execution(plan, out, buffers).run(on_event)
        statistics = gather(out.done.values())
        finish(plan, out, statistics, card_text(plan, statistics, card_metadata(plan, old_card), old_card))
        return _report(run, out, buffers, resumed)


def _report(run: Run, out: Destination, buffers: Sequence[WorkerMemory], resumed: int) -> Report:
    plan, statistics = run.plan, gather(out.done.values())
    seconds = time.monotonic() - run.begun
    timings: defaultdict[str, float] = defaultdict(float)
    for buffer in buffers:
        for phase, spent in buffer.seconds.items():
            timings[phase] += spent
    timings["wait"] = max(0.0, seconds * len(buffers) - sum(timings.values()))
    reports = pattern_reports(plan, statistics)
    return Report(
        source=str(plan.checkpoint.origin),
        destination=str(out.root),
        scheme=plan.scheme,
        method=plan.method_text,
        kernel=run.kernel.name,
        device_reason=run.device_reason,
        source_bytes=plan.checkpoint.tensor_bytes,
        output_bytes=plan.tensor_bytes,
        tensors=sum(shard.tensors for shard in plan.shards),
        quantized=sum(1 for _ in plan.weights()),
        kept=sum(not item.decision.quantize for item in plan.selection.tensors),
        relative_error=total_error(statistics),
        patterns=reports,
        warnings=plan.warnings + suspicions(reports, calibrated=run.calibrated is not None),
        resumed_shards=resumed,
        seconds=seconds,
        peak_memory=peak_bytes(),
        timings=dict(timings),
    )
