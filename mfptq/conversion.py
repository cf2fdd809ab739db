"""Convert a checkpoint: read headers, plan, claim the output, run, finish with config.json.

The two public functions, `plan` and `convert`, and the object between them. Nothing is written before the plan stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from .checking import check_plan
from .engines.findings import Finding
from .engines.tables import ENGINES, Engine
from .errors import counted
from .execution.events import OnEvent, ignore
from .execution.executors import Executor, Order, Request, ThreadExecutor
from .execution.memory_budget import caller_bytes, memory_errors
from .execution.prepare import Measuring, ResourceKeywords, Resources, prepare
from .output.publish import PushTarget
from .output.report import Report
from .planning.parts import Part
from .planning.plan import ConversionPlan, PlannedTensor
from .planning.settings import Decisions
from .planning.size_target import with_errors_beside
from .sizes import size_text
from .storage.files import expanded

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .execution.partial_run import PartReport
    from .execution.preview import Preview


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
        self.left_out = planned.checkpoint.left_out  # files neither converted nor copied, with their sizes in bytes

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

    def preview(
        self,
        destination: str | Path | None = None,
        *,
        overwrite: bool = False,
        push_to: PushTarget | None = None,
        discard_output: bool = False,
        estimate: bool = False,
        **resources: Unpack[ResourceKeywords],
    ) -> Preview:
        """Return what `run` with the same keywords would use and find: device, threads, memory, disk, what comes from the Hub.

        Nothing is written. Sizes are in bytes. With `destination` the output folder, its free disk, what can be resumed and the
        repo `push_to` are looked at. With `estimate`, half a second of quantizing and, from the Hub, a second of fetching
        (32 MiB at most) are measured. Raises what `run` would raise before its first byte.
        """
        from .execution.output_target import Target
        from .execution.preview import Estimates, preview

        target = None
        if destination is not None:
            target = Target(expanded(destination), overwrite=overwrite, push_to=push_to, discard=discard_output)
        estimates = Estimates(computing=estimate, fetching=estimate)
        with memory_errors():
            return preview(self._planned, Resources(**resources), target, held=self._held, estimates=estimates)

    def run(
        self,
        destination: str | Path,
        *,
        overwrite: bool = False,
        on_event: OnEvent | None = None,
        push_to: PushTarget | None = None,
        discard_output: bool = False,
        executor: Executor | None = None,
        **resources: Unpack[ResourceKeywords],
    ) -> Report:
        """Carry the plan out into a folder, and return what was done.

        The keywords are those of `convert`; `push_to` says where the output is published.
        """
        from .execution.output_target import Target
        from .execution.whole_run import run_whole

        target = Target(expanded(destination), overwrite=overwrite, push_to=push_to, discard=discard_output)
        doing = executor or ThreadExecutor()
        target.check()
        with memory_errors():
            order = partial(self._order, Resources(**resources), remote=doing.remote)
            return run_whole(self._planned, target, doing, order, on_event=on_event or ignore)

    def run_part(
        self,
        destination: str | Path,
        part: Part | str,
        *,
        on_event: OnEvent | None = None,
        **resources: Unpack[ResourceKeywords],
    ) -> PartReport:
        """Make one part of the output's shards, such as "2/16", into a folder that all machines share; see `convert`.

        Parts need not know of each other, and may be repeated, even at once. `finish` completes the output.
        """
        from .execution.partial_run import run_shards

        chosen = part if isinstance(part, Part) else Part.parse(part)
        with memory_errors():
            run = prepare(self._planned, Resources(**resources), self._held)
            return run_shards(run, expanded(destination), chosen.of(self._planned), on_event or ignore)

    def finish(
        self, destination: str | Path, *, max_memory: str | int = "1GiB", on_event: OnEvent | None = None
    ) -> Report:
        """Complete an output whose parts are done: check each shard by its digest, write the other files, config.json last.

        Raises DestinationError for shards that are missing or damaged, PlanMismatchError for parts of another plan.
        """
        from .execution.whole_run import complete_already, make_output

        root, tell = expanded(destination), on_event or ignore
        with memory_errors():
            if (done := complete_already(self._planned, root, tell)) is not None:
                return done
            return make_output(self._order(Resources(max_memory)), root, ThreadExecutor(), complete=True, on_event=tell)

    def _order(self, resources: Resources, *, remote: bool = False) -> Order:
        """Return the run with the memory it takes; where other machines do the work, `resources` are theirs."""
        own = Resources(resources.max_memory) if remote else resources
        return Order(prepare(self._planned, own, self._held), self._request, resources)

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
    from .planner import make_plan

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
    or holds a run with the same decisions: an unfinished one is resumed, a finished one checked and left as it is. The
    decisions are the keywords that `Decisions` describes.

    `max_memory` is a ceiling for the whole process, in bytes or as "2GB"; what a calling program already holds does not
    count. `max_workers` are threads, one for each core by default. `device` is `cpu`, `cuda[:N]` or `auto`. `overwrite`
    discards an existing output of mfptq. `on_event` is called in this thread with `Planned`, `Advanced`, and
    `ShardFinished`. `executor` says what does the work: by default threads of this process; `RayExecutor` a cluster, where
    memory and threads are those of each task.

    With `push_to_hub`, finished shards go to that repo, made `private` if asked for, while later ones are made, and one commit
    at the end makes all visible; with `discard_output` each is removed here once it is uploaded, and the rest in the end.

    Raises MfptqError and its subclasses; see `mfptq.errors`. The source is only read.
    """
    decisions = with_errors_beside(decisions, destination)
    resources: ResourceKeywords = {"max_memory": max_memory, "max_workers": max_workers, "device": device}
    with plan(source, on_event=on_event, **resources, **decisions) as made:
        return made.run(
            destination,
            overwrite=overwrite,
            on_event=on_event,
            **resources,
            push_to=PushTarget(push_to_hub, private, token=decisions.get("token")) if push_to_hub else None,
            discard_output=discard_output,
            executor=executor,
        )
