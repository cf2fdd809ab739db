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

from .checking import check_plan
from .checkpoint.companions import FileChoice
from .checkpoint.hub import HubOptions, open_checkpoint
from .engines.findings import Finding
from .engines.tables import ENGINES, Engine
from .errors import UsageError, counted
from .execution.engine import Execution
from .execution.events import Advanced, Event, OnEvent, ShardFinished
from .execution.memory_budget import INTERPRETER, memory_errors, peak_bytes, resident_bytes
from .execution.prepare import Resources, Run, prepare
from .execution.worker_memory import WorkerMemory
from .output.destination import Destination, open_destination
from .output.finish import finish, source_card
from .output.finished import finished_by, finished_report
from .output.leftovers import OutputClaim, abandon
from .output.model_card import card_metadata, card_text
from .output.publish import Publisher, PushTarget, push
from .output.report import Report, gather, pattern_reports, suspicions, total_error
from .output.uploads import MAX_WAITING, Uploads, published_report, uploading
from .planning.plan import ConversionPlan, PlannedTensor, build_plan
from .planning.settings import Decisions, check_decisions, input_margin
from .scales.reading import AUTO, InputScales, read_input_scales
from .scales.uncalibrated import UncalibratedInputs
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
        self.left_out = (
            planned.checkpoint.left_out
        )  # files that are neither converted nor copied, with their sizes in bytes

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

    def check(self, *, engines: Sequence[Engine] = ENGINES) -> tuple[Finding, ...]:
        """Return what inference engines would find wrong with the output, before a byte of it is written."""
        return check_plan(self._planned, engines)

    def run(
        self,
        destination: str | Path,
        *,
        max_memory: str | int = "1GiB",
        max_workers: int | None = None,
        device: str = "cpu",
        overwrite: bool = False,
        on_event: OnEvent | None = None,
        push_to: PushTarget | None = None,
        discard_output: bool = False,
    ) -> Report:
        """Carry the plan out into a folder, and return what was done; see `convert`. `push_to` says where it is published."""
        root, tell, planned = expanded(destination), on_event or _ignore, self._planned
        if discard_output and push_to is None:
            raise UsageError("discard_output is true, but nothing is pushed to a repo: the output would be lost")
        with memory_errors():
            finished = None if overwrite else finished_by(planned, root, lambda: tell(Advanced(0)))
            if finished is not None:
                report = finished_report(planned, root, finished, peak_memory=peak_bytes())
                return report if push_to is None else replace(report, published=push(root, push_to).url)
            uploads = None
            if push_to is not None:
                publisher = Publisher(root, push_to)
                publisher.open()
                published = published_report(publisher)
                if discard_output and published.get("plan") == planned.digest:
                    return finished_report(planned, root, published, peak_memory=peak_bytes())
                publisher.refuse_foreign()
                uploads = Uploads(publisher, discard=discard_output)
            run = prepare(planned, Resources(max_memory, max_workers, device), self._held)
            return _carry_out(run, root, overwrite=overwrite, on_event=tell, uploads=uploads)

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


def convert(  # noqa: PLR0913 - one keyword for each option of the command
    source: str | Path,
    destination: str | Path,
    *,
    max_memory: str | int = "1GiB",
    max_workers: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    discard_output: bool = False,
    **decisions: Unpack[Decisions],
) -> Report:
    """Convert a checkpoint to NVFP4 and return what was done.

    `source` is a folder in Hugging Face layout or a Hub repo id, `destination` a folder that does not exist, is empty,
    or holds a run with the same decisions: an unfinished one is resumed, a finished one checked and left as it is. The decisions are the keywords that `Decisions`
    describes. `max_memory` is a ceiling for the whole process, in bytes or as "2GB"; what a calling program already holds
    does not count. `max_workers` are threads, one for each core by default. `device` is `cpu`, `cuda[:N]` or `auto`.
    `overwrite` discards an existing output of mfptq. `on_event` is called in this thread with `Planned`, `Advanced`, and
    `ShardFinished`.

    With `push_to_hub`, finished shards go to that repo, made `private` if asked for, while later ones are made, and one commit
    at the end makes all visible; with `discard_output` each is removed here once it is uploaded, and the rest in the end.

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
            push_to=PushTarget(push_to_hub, private, token=decisions.get("token")) if push_to_hub else None,
            discard_output=discard_output,
        )


def _ignore(_event: Event) -> None:
    """Take no notice of an event."""


def make_plan(source: str | Path, **decisions: Unpack[Decisions]) -> ConversionPlan:
    """Return the plan with everything that the later stages need; `plan` wraps it for the public."""
    settings = check_decisions(decisions)
    keep = decisions.get("keep_source", False)
    hub = HubOptions(decisions.get("revision"), decisions.get("token"), decisions.get("cache_dir"), keep)
    choice = FileChoice(tuple(decisions.get("include_files", ())), tuple(decisions.get("skip_files", ())))
    scales, calibration = None, None
    with ExitStack() as opened:
        if (given := decisions.get("input_scales")) is not None:
            if given != AUTO:
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
            scales = calibration.input_scales(input_margin(settings, calibration.description.origin))
        if settings.scheme == "NVFP4A16" and given is None:
            scales = None  # the rest of what `like` or `calibration` tells is of use without them
        checkpoint = open_checkpoint(source, hub, choice)
        opened.callback(checkpoint.source.close)
        made = build_plan(
            checkpoint, settings, UncalibratedInputs(checkpoint) if given == AUTO else scales, calibration
        )
        opened.pop_all()
    return made


def _carry_out(
    run: Run, destination: Path, *, overwrite: bool, on_event: OnEvent, uploads: Uploads | None = None
) -> Report:
    """Do the work of a run and return its report."""
    plan, memory = run.plan, run.memory
    sizes = {shard.name: shard.size for shard in plan.shards}
    claim = OutputClaim(plan.checkpoint.origin.folder, plan.digests, sizes, plan.checkpoint.companions)
    if uploads is not None:
        uploaded = {file.name: file.sha256 for file in uploads.uploaded.values()}
        claim = replace(claim, uploaded=uploaded, at_once=MAX_WAITING + 1 if uploads.discard else None)
    buffers = [WorkerMemory(run.kernel, memory.tile_bytes, run.calibrated) for _ in range(memory.workers)]
    old_card = source_card(plan.checkpoint.source)
    with open_destination(destination, claim, overwrite=overwrite, poll=lambda: on_event(Advanced(0))) as out:
        resumed = len(out.done)
        with uploading(uploads):
            tell = on_event if uploads is None else _feeding(uploads, out, on_event)
            Execution(plan, out, buffers).run(tell, held_bytes=memory.spare)
            if uploads is not None:
                uploads.finish(lambda: on_event(Advanced(0)))
        statistics = gather(out.done.values())
        card = card_text(plan, statistics, card_metadata(plan, old_card), old_card)
        sums = finish(plan, out, statistics, card, gone=uploads.gone if uploads is not None else ())
        report = _report(run, out, buffers, resumed)
        if uploads is not None:
            report = replace(report, published=uploads.commit(out.done.values(), sums).url)
    if uploads is not None and uploads.discard:
        abandon(destination, claim, existed=False)
    return report


def _feeding(uploads: Uploads, out: Destination, on_event: OnEvent) -> OnEvent:
    """Start uploading, and return what is to be called with the run's events: it hands on every finished shard."""
    out.before_shard = uploads.wait_for_room
    uploads.begin()

    def feed(event: Event) -> None:
        if isinstance(event, ShardFinished):
            uploads.add(out.done[event.name])
        try:
            on_event(event)
        except BaseException:
            uploads.stop()
            raise

    return feed


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
        quantized=sum(1 for _ in plan.weights()) + len(plan.carried.weights),
        kept=sum(not item.decision.quantize for item in plan.selection.tensors),
        relative_error=total_error(statistics),
        patterns=reports,
        warnings=plan.warnings + suspicions(reports, calibrated=run.calibrated is not None),
        resumed_shards=resumed,
        seconds=seconds,
        peak_memory=peak_bytes(),
        timings=dict(timings),
        left_out=plan.checkpoint.left_out,
        fetched_bytes=plan.checkpoint.source.fetched_bytes,
    )
