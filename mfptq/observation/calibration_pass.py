"""Run a model over samples, batch by batch, and keep the statistics of its layers' inputs in a file that is gone on with.

Called by `calibrate` for all samples, and by `cluster.tasks` for a part of them. The text and the plan are the callers' business.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from ..calibration.file import Description, Level, check_output, write_calibration
from ..calibration.reading import load_calibration
from ..errors import UsageError, quote
from ..names.attention import key_modules
from ..planning.plan import ConversionPlan
from . import models
from .forward_options import ForwardOptions
from .inputs import Inputs, find_blocks, find_inputs
from .key_values import KeyValueRanges
from .recording import Recorder
from .residency import Residency, choose_residency, measure_demand, with_variants
from .sensitivity import measure_sensitivities, short_texts, variants
from .streaming import load_runner
from .texts import Samples, TokenIds

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


@dataclass(slots=True)
class _Progress:
    """Tells `on_event` how far a pass is; `steps` counts blocks that were run for a sample, those of earlier passes too."""

    on_event: OnProgress | None
    done: Description
    blocks: int
    steps: int = 0

    def step(self) -> None:
        """Count a block that was run for a sample."""
        self.steps += 1
        self.tell()

    def tell(self) -> None:
        """Say how far the pass is."""
        if self.on_event is not None:
            samples, requested = self.done.samples, self.done.requested
            self.on_event(CalibrationProgress(samples, requested, self.steps, requested * self.blocks))


def run_pass(
    plan: ConversionPlan,
    share: Share,
    output: Path,
    options: CalibrationOptions,
    *,
    overwrite: bool = False,
    on_event: OnProgress | None = None,
) -> Description:
    """Take the statistics of a share's samples into a file, written anew after every batch; go on with an interrupted pass's."""
    skeleton = models.build_skeleton(plan.checkpoint, options.dtype)
    models.check_vocabulary(skeleton.model, share.samples.highest)
    inputs = find_inputs(plan, skeleton.model, all_experts=options.all_experts)
    keys = key_modules(item.candidate.module for item in plan.selection.tensors)
    recorder = Recorder(inputs, options.statistics, KeyValueRanges(tuple(keys)))
    done = described(plan, options, share.samples)
    if not overwrite and output.exists():
        done = resume(output, done, recorder)
    blocks = find_blocks(skeleton.model, inputs)
    progress = _Progress(on_event, done, len(blocks.names), done.samples * len(blocks.names))
    asked = options.sensitivities and not recorder.sensitivities
    rounded = variants(inputs, skeleton.model)[share.number - 1 :: share.count] if asked else []
    residency = _residency(skeleton, inputs, share, options, variants=len(rounded))
    if residency.streamed:
        blocks.check_streamable()
    stream_in = output.parent if residency.streamed else None
    with load_runner(skeleton, blocks.names, options, stream_in=stream_in) as runner:
        runner.to_end = bool(blocks.outside)
        if rounded:
            runner.tick = progress.tell
            recorder.sensitivities.update(measure_sensitivities(runner, short_texts(share.texts), rounded))
        runner.tick = progress.step
        with recorder.attached(runner.model):
            while not done.is_complete:
                samples = share.samples.ids[done.samples : done.samples + residency.batch]
                runner.run(samples)
                recorder.check_reached()
                done = progress.done = replace(done, samples=done.samples + len(samples))
                write_calibration(output, recorder.contents(done))
                progress.tell()
    return done


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
    with closing(load_calibration(output)) as calibration:
        found = calibration.description
        if found.is_complete:
            check_output(output, overwrite=False)
        compared = ("origin", "model", "revision", "statistics", "requested", "max_seq_length", "dataset")
        others = [f"another {name}" for name in compared if getattr(found, name) != getattr(description, name)]
        if others or not recorder.restore(calibration):
            other = others[0] if others else "other inputs"
            raise UsageError(
                f"output {quote(output)} holds an unfinished run with {other}: choose another name, or overwrite it"
            )
        return found


def _residency(
    skeleton: models.Skeleton, inputs: Inputs, share: Share, options: CalibrationOptions, *, variants: int
) -> Residency:
    demand = measure_demand(skeleton, inputs.infos, level=options.statistics, length=share.longest)
    if variants:
        demand = with_variants(demand, variants, share.longest)
    return choose_residency(demand, options.budget, options.batch_size, options.device)
