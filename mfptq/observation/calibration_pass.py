"""Run a model over samples, batch by batch, and keep the statistics of its layers' inputs in a file that is gone on with.

Called by `calibrate` for all samples, and by `cluster.tasks` for a part of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..calibration.file import Contents, Description, Level, check_output, parse_description, write_calibration
from ..calibration.reading import Calibration, load_calibration
from ..checkpoint.folder import Checkpoint, read_shard
from ..checkpoint.source import FolderSource
from ..errors import ScaleError, UsageError, quote
from ..planning.plan import ConversionPlan
from .forward_options import ForwardOptions
from .inputs import Blocks, find_blocks, find_inputs
from .key_values import KeyValueRanges
from .recording import Recorder
from .texts import Samples, TokenIds

if TYPE_CHECKING:
    from .models import Skeleton
    from .streaming import Runner

OFFLOAD = ".mfptq-"  # folders of weights that are rearranged while a model is streamed
OnProgress = Callable[["CalibrationProgress"], object]


@dataclass(frozen=True, slots=True)
class CalibrationProgress:
    """How far a calibration is: samples that are in the file, and steps (a block run for a sample) done of all."""

    samples: int
    requested: int
    steps: int
    total_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions(ForwardOptions):
    """How a calibration is made: the keywords of `calibrate` that decide neither what is read nor written, checked."""

    batch_size: int | None
    statistics: Level
    all_experts: bool
    sensitivities: bool

    def __post_init__(self) -> None:
        ForwardOptions.__post_init__(self)
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}, expected at least 1")
        if self.statistics not in get_args(Level):
            raise UsageError(f"statistics {quote(self.statistics)} are unknown, expected {', '.join(get_args(Level))}")


@dataclass(frozen=True, slots=True)
class Share:
    """What one pass does of a calibration: its samples, and every `count`-th of the sensitivities, from the `number`-th on.

    `texts` are those that sensitivities are measured on: the first of all samples, also where these are others.
    """

    samples: Samples
    texts: tuple[TokenIds, ...]
    number: int = 1
    count: int = 1

    @classmethod
    def whole(cls, samples: Samples) -> Share:
        """Return the share of a pass that does all of a calibration."""
        return cls(samples, samples.ids)

    @property
    def longest(self) -> int:
        """How many tokens the longest text has."""
        return max(len(ids) for ids in (*self.samples.ids, *self.texts))


def run_pass(
    plan: ConversionPlan,
    share: Share,
    output: Path,
    options: CalibrationOptions,
    *,
    overwrite: bool = False,
    on_event: OnProgress | None = None,
) -> Description:
    """Take the statistics of a share's samples into a file; go on with one that an interrupted pass left."""
    from . import models

    skeleton = models.build_skeleton(plan.checkpoint, options.dtype)
    inputs = find_inputs(plan, skeleton.model, all_experts=options.all_experts)
    description = described(plan, options, share.samples)
    modules = (item.candidate.module for item in plan.selection.tensors)
    recorder = Recorder(inputs, options.statistics, key_values=KeyValueRanges.of(modules))
    if not overwrite and output.exists():
        description = resume(output, description, recorder)
    return _Making(skeleton, plan.checkpoint, recorder, options, on_event).run(output, description, share)


def described(plan: ConversionPlan, options: CalibrationOptions, samples: Samples) -> Description:
    """Return what a file says of a pass that has done nothing yet."""
    origin = plan.checkpoint.origin
    return Description(
        model=origin.name,
        revision=origin.revision or "",
        statistics=options.statistics,
        requested=len(samples.ids),
        max_seq_length=options.max_seq_length,
        dataset=samples.digest,
    )


def resume(output: Path, description: Description, recorder: Recorder) -> Description:
    """Take an unfinished file's sums over, and return what has been done; raises UsageError if it is of another run."""
    calibration = load_calibration(output)
    try:
        found = calibration.description
        if found.is_complete:
            check_output(output, overwrite=False)
        if replace(found, samples=0) != description:
            fields = ("origin", "model", "revision", "statistics", "requested", "max_seq_length", "dataset")
            other = next(name for name in fields if getattr(found, name) != getattr(description, name))
            raise UsageError(
                f"output {quote(output)} holds an unfinished run with another {other}: choose another name, or overwrite it"
            )
        _take_over(calibration, recorder)
        return found
    finally:
        calibration.close()


def read_description(path: Path) -> Description:
    """Return what a file says of its making, without checking the statistics in it."""
    source = FolderSource(path.parent)
    try:
        return parse_description(read_shard(source, path.name).header.metadata)
    finally:
        source.close()


def _take_over(calibration: Calibration, recorder: Recorder) -> None:
    known = {info.name: info for info in recorder.inputs.infos}
    routed = calibration.routed()
    if (
        any(known.get(name) != info for name, info in calibration.inputs.items())
        or routed.keys() != recorder.routed.keys()
    ):
        raise UsageError(
            f"output {quote(calibration.path)} holds an unfinished run with other inputs: choose another name, or overwrite it"
        )
    for info in calibration.inputs.values():
        recorder.sums[info.name].restore(calibration.read(info))
    recorder.routed.update(routed)
    recorder.sensitivities.update(calibration.sensitivities)
    recorder.key_values.found.update(calibration.key_value_ranges())


@dataclass(slots=True)
class _Making:
    skeleton: Skeleton
    checkpoint: Checkpoint
    recorder: Recorder
    options: CalibrationOptions
    on_event: OnProgress | None
    steps: int = 0

    def run(self, output: Path, description: Description, share: Share) -> Description:
        """Run the samples that are left, batch by batch, and write the file after each."""
        from . import models

        samples = share.samples
        models.check_vocabulary(self.skeleton.model, samples.highest)
        blocks = find_blocks(self.skeleton.model, self.recorder.inputs)
        count = len(blocks.names)
        self.steps = description.samples * count

        def report(steps: int) -> None:
            self.steps += steps
            self._report(description, count)

        with self._runner(output.parent, blocks, share, report) as (runner, batch):
            while not description.is_complete:
                done = description.samples
                part = samples.ids[done : done + batch]
                runner.run(part)
                self.recorder.check_reached()
                description = replace(description, samples=done + len(part))
                self._write(output, description)
                self._report(description, count)
        return description

    def _report(self, description: Description, blocks: int) -> None:
        if self.on_event is not None:
            requested = description.requested
            self.on_event(CalibrationProgress(description.samples, requested, self.steps, requested * blocks))

    def _write(self, output: Path, description: Description) -> None:
        recorder = self.recorder
        contents = Contents(description, recorder.seen(), recorder.statistics, recorder.routed, recorder.sensitivities)
        write_calibration(output, replace(contents, key_values=recorder.key_values.found))

    @contextmanager
    def _runner(
        self, folder: Path, blocks: Blocks, share: Share, report: Callable[[int], None]
    ) -> Iterator[tuple[Runner, int]]:
        """Load the model, and lend what runs it and how many samples it takes at a time."""
        from . import models
        from .residency import choose_residency, measure_demand
        from .sensitivity import Walk, short_texts, variants, with_walk
        from .streaming import Runner, open_stream

        options, infos = self.options, self.recorder.inputs.infos
        longest = share.longest
        asked = variants(self.recorder.inputs, self.skeleton.model) if options.sensitivities else []
        asked = asked[share.number - 1 :: share.count]
        demand = measure_demand(self.skeleton, self.checkpoint, infos, level=options.statistics, length=longest)
        demand = with_walk(demand, len(asked), longest) if asked else demand
        residency = choose_residency(demand, options.budget, options.batch_size, options.device)
        with ExitStack() as stack:
            if residency.streamed and blocks.outside:
                raise ScaleError(
                    f"{quote(blocks.outside[0])} lies outside of the repeated blocks that are streamed: raise max_memory "
                    "to hold the model, or ignore it"
                )
            if residency.streamed:
                offload = stack.enter_context(tempfile.TemporaryDirectory(prefix=OFFLOAD, dir=folder))
                model = models.load_on_disk(self.skeleton, Path(offload))
                runner: Runner = open_stream(
                    model, blocks.names, self.checkpoint, device=options.device, dtype=options.dtype
                )
            else:
                runner = Runner(models.load_whole(self.skeleton, options.device), blocks.names, options.device)
                runner.to_end = bool(blocks.outside)
            stack.enter_context(runner.engaged())
            if asked and not self.recorder.sensitivities:
                walk = Walk(runner, short_texts(share.texts), partial(report, 0))
                self.recorder.sensitivities.update(walk.run(asked))
            runner.tick = partial(report, 1)
            stack.enter_context(self.recorder.attached(runner.model))
            yield runner, residency.batch
