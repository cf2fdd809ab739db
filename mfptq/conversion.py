"""Convert a checkpoint: read headers, plan, claim the output, run, finish with config.json.

The two public functions, `plan` and `convert`, and the object between them. Nothing is written before the plan stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .checking import check_plan
from .checkpoint.companions import FileChoice
from .checkpoint.hub import HubOptions, open_checkpoint
from .engines.findings import Finding
from .engines.tables import ENGINES, Engine
from .errors import UsageError, counted
from .execution.events import Advanced, OnEvent, ignore
from .execution.executors import Executor, Order, Request, ThreadExecutor
from .execution.memory_budget import caller_bytes, memory_errors, peak_bytes
from .execution.prepare import Measuring, Resources, prepare
from .output.finished import finished_by, finished_report
from .output.publish import Publisher, PushTarget, push
from .output.report import Report
from .output.uploads import Uploads, published_report
from .planning.parts import Part
from .planning.plan import ConversionPlan, PlannedTensor, build_plan
from .planning.settings import Decisions, check_decisions, input_margin
from .planning.size_target import with_errors_beside
from .scales.reading import AUTO, InputScales, read_input_scales
from .scales.uncalibrated import UncalibratedInputs
from .sizes import size_text
from .storage.files import expanded

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .execution.partial_run import PartReport


class Plan:
    """What a conversion will do; `run` does it. For one thread.

    It holds the source's files open: use it in a `with` block, or call `close`.
    """

    def __init__(self, planned: ConversionPlan, held: int = 0, request: Request | None = None) -> None:
        self._planned = planned
        self._request = request or Request.of(planned, {})
        self._held = held  # bytes that the process held before: the caller's own
        self.source_bytes = planned.checkpoint.tensor_bytes
        self.output_bytes = planned.tensor_bytes
        self.scheme = planned.scheme
        self.left_out = (
            planned.checkpoint.left_out
        )  # files that are neither converted nor copied, with their sizes in bytes

    def __repr__(self) -> str:
        weights = counted(sum(self.methods.values()), "weight", "weights")
        formats = self._planned.formats
        what = (
            f"NVFP4 ({'W4A4' if self.scheme == 'NVFP4' else 'W4A16'})"
            if formats.keys() == {self.scheme.lower()}
            else ", ".join(formats)
        )
        sizes = f"{size_text(self.source_bytes)} -> {size_text(self.output_bytes)}"
        return f"Plan: {weights} to {what}, {sizes}, {counted(len(self._planned.shards), 'shard', 'shards')}"

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

    def run(  # noqa: PLR0913 - one keyword for each option of the command
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
        executor: Executor | None = None,
    ) -> Report:
        """Carry the plan out into a folder, and return what was done; see `convert`. `push_to` says where it is published."""
        from .execution.carrying_out import carry_out

        root, tell, planned = expanded(destination), on_event or ignore, self._planned
        if discard_output and push_to is None:
            raise UsageError("discard_output is true, but nothing is pushed to a repo: the output would be lost")
        doing, resources = executor or ThreadExecutor(), Resources(max_memory, max_workers, device)
        if discard_output and doing.remote:
            raise UsageError("discard_output is true, but other machines do the work: they do not wait for uploads")
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
            run = prepare(planned, Resources(max_memory) if doing.remote else resources, self._held)
            order = Order(run, self._request, resources)
            return carry_out(order, root, doing, overwrite=overwrite, on_event=tell, uploads=uploads)

    def run_part(
        self,
        destination: str | Path,
        part: Part | str,
        *,
        max_memory: str | int = "1GiB",
        max_workers: int | None = None,
        device: str = "cpu",
        on_event: OnEvent | None = None,
    ) -> PartReport:
        """Make one part of the output's shards, such as "2/16", into a folder that all machines share; see `convert`.

        Parts need not know of each other, and may be repeated, even at once. `finish` completes the output.
        """
        from .execution.partial_run import run_shards

        chosen = part if isinstance(part, Part) else Part.parse(part)
        with memory_errors():
            run = prepare(self._planned, Resources(max_memory, max_workers, device), self._held)
            return run_shards(run, expanded(destination), chosen.of(self._planned), on_event or ignore)

    def finish(
        self, destination: str | Path, *, max_memory: str | int = "1GiB", on_event: OnEvent | None = None
    ) -> Report:
        """Complete an output whose parts are done: check each shard by its digest, write the other files, config.json last.

        Raises DestinationError for shards that are missing or damaged, PlanMismatchError for parts of another plan.
        """
        from .execution.carrying_out import carry_out

        root, tell, resources = expanded(destination), on_event or ignore, Resources(max_memory)
        with memory_errors():
            finished = finished_by(self._planned, root, lambda: tell(Advanced(0)))
            if finished is not None:
                return finished_report(self._planned, root, finished, peak_memory=peak_bytes())
            order = Order(prepare(self._planned, resources, self._held), self._request, resources)
            return carry_out(order, root, ThreadExecutor(), complete=True, on_event=tell)

    def close(self) -> None:
        """Close the source's files and the calibration file."""
        self._planned.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def plan(
    source: str | Path,
    *,
    max_memory: str | int = "1GiB",
    max_workers: int | None = None,
    device: str = "cpu",
    on_event: OnEvent | None = None,
    **decisions: Unpack[Decisions],
) -> Plan:
    """Return what `convert` with the same decisions would do, from headers alone; raises what it would raise.

    The decisions are the keywords that `Decisions` describes. With `target_bits` or `target_size` the weights are read once,
    unless `format_errors` has what is needed; the other keywords are for that, as those of `convert`.
    Close the plan, or use it in a `with` block.
    """
    held = caller_bytes()
    resources = Resources(max_memory, max_workers, device)
    measuring = Measuring(resources, on_event or ignore, held, decisions.get("format_errors"))
    given = cast("Decisions", {name: tuple(v) if isinstance(v, Iterator) else v for name, v in decisions.items()})
    with memory_errors():
        planned = make_plan(source, measuring, **given)
        return Plan(planned, held, Request.of(planned, given))


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
    executor: Executor | None = None,
    **decisions: Unpack[Decisions],
) -> Report:
    """Convert a checkpoint to NVFP4 and return what was done.

    `source` is a folder in Hugging Face layout or a Hub repo id, `destination` a folder that does not exist, is empty,
    or holds a run with the same decisions: an unfinished one is resumed, a finished one checked and left as it is. The decisions are the keywords that `Decisions`
    describes. `max_memory` is a ceiling for the whole process, in bytes or as "2GB"; what a calling program already holds
    does not count. `max_workers` are threads, one for each core by default. `device` is `cpu`, `cuda[:N]` or `auto`.
    `overwrite` discards an existing output of mfptq. `on_event` is called in this thread with `Planned`, `Advanced`, and
    `ShardFinished`. `executor` says what does the work: by default threads of this process; `RayExecutor` a cluster, where
    memory and threads are those of each task.

    With `push_to_hub`, finished shards go to that repo, made `private` if asked for, while later ones are made, and one commit
    at the end makes all visible; with `discard_output` each is removed here once it is uploaded, and the rest in the end.

    Raises MfptqError and its subclasses; see `mfptq.errors`. The source is only read.
    """
    decisions = with_errors_beside(decisions, destination)
    resources: Any = {"max_memory": max_memory, "max_workers": max_workers, "device": device, "on_event": on_event}
    with plan(source, **resources, **decisions) as made:
        return made.run(
            destination,
            overwrite=overwrite,
            **resources,
            push_to=PushTarget(push_to_hub, private, token=decisions.get("token")) if push_to_hub else None,
            discard_output=discard_output,
            executor=executor,
        )


def make_plan(source: str | Path, measuring: Measuring | None = None, **decisions: Unpack[Decisions]) -> ConversionPlan:
    """Return the plan with everything that the later stages need; `plan` wraps it for the public.

    `measuring` is what the pass over the weights may use that a target for the size takes.
    """
    settings = check_decisions(decisions)
    keep = decisions.get("keep_source", False)
    hub = HubOptions(decisions.get("revision"), decisions.get("token"), decisions.get("cache_dir"), keep)
    included, skipped = tuple(decisions.get("include_files", ())), tuple(decisions.get("skip_files", ()))
    choice = FileChoice(included, skipped, follow_links=decisions.get("follow_links", False))
    scales, calibration = None, None
    with ExitStack() as opened:
        if (given := decisions.get("input_scales")) is not None:
            if given != AUTO:
                scales = _given_scales(given, hub)
        elif (path := decisions.get("like")) is not None:
            from .scales.sibling import read_sibling

            sibling = read_sibling(path, token=hub.token, cache_dir=hub.cache_dir)
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
        found = UncalibratedInputs(checkpoint) if given == AUTO else scales
        made = build_plan(checkpoint, settings, found, calibration)
        if settings.target is not None and settings.chosen is None:
            from .execution.size_target import aimed

            aim = measuring or Measuring(path=decisions.get("format_errors"))
            made = aimed(made, aim, lambda changed: build_plan(checkpoint, changed, found, calibration))
        opened.pop_all()
    return made


def _given_scales(given: str | Path | InputScales, hub: HubOptions) -> InputScales:
    if isinstance(given, InputScales):
        return given
    return read_input_scales(given, token=hub.token, cache_dir=hub.cache_dir)
