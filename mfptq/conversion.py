"""The whole story: read headers, plan, claim the output, run, finish with config.json."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .checkpoint.folder import CONFIG, INDEX
from .checkpoint.hub import HubOptions, open_checkpoint
from .dtypes import NUMPY_DTYPES
from .errors import SourceError, UsageError
from .execution.engine import Execution
from .execution.events import Advanced, Event, OnEvent
from .execution.memory_budget import (
    INTERPRETER,
    KERNEL_BYTES,
    MemoryPlan,
    check_data_limit,
    memory_errors,
    parse_size,
    peak_bytes,
    plan_memory,
    resident_bytes,
)
from .execution.worker_memory import WorkerMemory
from .kernels import ErrorStats, Kernel, QuantizeArgs, load_kernel
from .kernels.calibrated import CALIBRATED_METHODS, CalibratedKernel, PreparedStatistics, load_calibrated_kernel
from .kernels.choice import choose_device
from .limits import MAX_CONFIG_BYTES
from .nvfp4 import BLOCK_SIZE
from .output.destination import Destination, open_destination
from .output.leftovers import CARD, MANIFEST, REPORT, OutputClaim
from .output.model_card import card_metadata, card_text
from .output.report import Report, gather, kind_reports, report_text, suspicions, total_error
from .planning.plan import Plan, build_plan
from .planning.quantization_config import Scheme
from .planning.rules import Rules
from .planning.settings import Settings
from .scales.reading import read_input_scales
from .storage.digest import available_cores
from .storage.files import confined, read_small


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use; none of it changes the output. `max_memory` is a ceiling for the process, in bytes or text."""

    max_memory: str | int = "1GiB"
    workers: int | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Run:
    """A conversion about to start."""

    plan: Plan
    kernel: Kernel
    calibrated: CalibratedKernel | None
    memory: MemoryPlan
    device_reason: str
    begun: float = field(default_factory=time.monotonic)


def convert(  # noqa: PLR0913 - one keyword for each option of the command
    source: str | Path,
    destination: str | Path,
    *,
    scheme: Scheme | None = None,
    method: str | None = None,
    ignore: Iterable[str] = (),
    targets: Iterable[str] = (),
    default_ignore: bool = True,
    calibration: str | Path | None = None,
    input_scales: str | Path | None = None,
    input_scales_kind: str | None = None,
    like: str | Path | None = None,
    hub: HubOptions | None = None,
    max_memory: str | int = "1GiB",
    workers: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    on_event: OnEvent | None = None,
) -> Report:
    """Convert a checkpoint to NVFP4 and return what was done.

    `source` is a folder in Hugging Face layout or a Hub repo id, `destination` a folder that does not exist, is empty,
    or holds an unfinished run with the same settings, which is resumed. `scheme` None means W4A4 (`NVFP4`) when
    input scales are given and weight-only `NVFP4A16` otherwise: by `calibration`, a calibration file, which makes the
    weights better too; by `input_scales`; or by `like`, an NVFP4 checkpoint whose choice of layers is taken as well.
    `method` None means the strongest that the calibration file allows, `search` without one. `max_memory` is a ceiling
    for the whole process; what a calling program already holds does not count. `on_event` is called in this thread.

    Raises MfptqError and its subclasses; see `mfptq.errors`. The source is only read.
    """
    held = max(0, resident_bytes() - INTERPRETER)
    settings = Settings(Rules(tuple(ignore), tuple(targets), default_ignore), method, scheme)
    with memory_errors():
        plan = make_plan(source, settings, InputScaleSource(input_scales, input_scales_kind, calibration, like), hub)
        try:
            run = prepare(plan, Resources(max_memory, workers, device), held)
            return carry_out(run, Path(destination), overwrite=overwrite, on_event=on_event or _ignore)
        finally:
            plan.close()


def _ignore(_event: Event) -> None:
    """Take no notice of an event."""


@dataclass(frozen=True, slots=True)
class InputScaleSource:
    """Where what is known of the layers' inputs comes from: at most one of the paths gives the input scales."""

    input_scales: str | Path | None = None
    input_scales_kind: str | None = None
    calibration: str | Path | None = None
    like: str | Path | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("calibration", "input_scales", "like") if getattr(self, name) is not None]
        if len(given) > 1:
            options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{options} both tell the input scales: give one of them")


_NOTHING = InputScaleSource()


def make_plan(
    source: str | Path, settings: Settings, known: InputScaleSource = _NOTHING, hub: HubOptions | None = None
) -> Plan:
    """Return the plan of a conversion: what `convert` would do, from headers and the calibration file alone."""
    weight_only = settings.scheme == "NVFP4A16"
    scales, calibration = None, None
    if known.input_scales is not None:
        scales = read_input_scales(known.input_scales, known.input_scales_kind)
    elif known.like is not None:
        from .calibration.extract import read_sibling

        model = read_sibling(known.like)
        settings = replace(settings, rules=replace(settings.rules, like=model))
        scales = None if weight_only else model.scales
    elif known.calibration is not None:
        from .calibration.reading import load_calibration

        calibration = load_calibration(known.calibration)
        scales = None if weight_only else calibration.input_scales()
    return build_plan(open_checkpoint(source, hub), settings, scales, calibration)


def prepare(plan: Plan, resources: Resources, held: int = 0) -> Run:
    """Return a run that fits into its memory; `held` bytes of the process are the caller's own."""
    workers = resources.workers if resources.workers is not None else available_cores()
    if workers < 1:
        raise UsageError(f"{workers} workers cannot do anything: use at least 1")
    budget = parse_size(resources.max_memory) + held
    statistics = plan.statistics_bytes
    choice = choose_device(resources.device, sum(weight.size for weight in plan.weights()), workers)
    family = choice.device.split(":")[0]
    known = "calibrated" if family == "cpu" and statistics else family
    check_data_limit(known if known in KERNEL_BYTES else "torch")
    kernel = load_kernel(choice.device)
    calibrated = load_calibrated_kernel(choice.device) if statistics else None
    _try_out(plan, kernel, calibrated)
    memory = plan_memory(budget, resident_bytes(), workers, statistics=statistics, largest_tile=kernel.tile_bytes)
    return Run(plan, kernel, calibrated, memory, choice.reason)


def _try_out(plan: Plan, kernel: Kernel, calibrated: CalibratedKernel | None) -> None:
    """Call every function that the run will need once: what they bring, or take to compile, must be in the memory plan."""
    packed, scales = np.empty((1, BLOCK_SIZE // 2), np.uint8), np.empty((1, 1), np.uint8)
    for dtype, weight in {weight.dtype: weight for weight in plan.weights()}.items():
        block = np.zeros((1, BLOCK_SIZE), NUMPY_DTYPES[dtype])
        with plan.checkpoint.source.reading(weight.shard, weight.offset, block.nbytes) as fd:
            kernel.amax_in_file(fd, weight.offset, np.empty_like(block))
        kernel.amax(block)
        for method in plan.methods:
            recipe = QuantizeArgs(method, 1.0)
            if method in CALIBRATED_METHODS and calibrated is not None:
                known = PreparedStatistics.neutral(method, BLOCK_SIZE)
                calibrated.quantize(block, recipe, known, packed=packed, scales=scales)
            else:
                kernel.quantize(block, recipe, packed, scales)


def carry_out(run: Run, destination: Path, *, overwrite: bool, on_event: OnEvent) -> Report:
    """Do the work of a run and return its report."""
    plan, memory = run.plan, run.memory
    sizes = {shard.name: shard.size for shard in plan.shards}
    claim = OutputClaim(plan.checkpoint.origin.folder, plan.digests, sizes, plan.checkpoint.companions)
    buffers = [WorkerMemory(run.kernel, memory.tile_bytes, run.calibrated) for _ in range(memory.workers)]
    source_card = _source_card(plan.checkpoint.origin.folder)
    with open_destination(destination, claim, overwrite=overwrite, poll=lambda: on_event(Advanced(0))) as out:
        resumed = len(out.done)
        Execution(plan, out, buffers).run(on_event)
        kinds = gather(out.done.values())
        _finalize(plan, out, kinds, card_text(plan, kinds, card_metadata(plan, source_card), source_card))
        return _report(run, out, buffers, resumed)


def _finalize(plan: Plan, out: Destination, kinds: Mapping[str, ErrorStats], card: str) -> None:
    """Write everything that is not a shard; config.json last, since it makes the folder a checkpoint."""
    root = plan.checkpoint.origin.folder
    sums = {result.name: result.sha256 for result in out.done.values()}
    for name in plan.checkpoint.companions:
        sums[name] = out.copy(name, confined(root, name))
    texts = {REPORT: report_text(plan, kinds), CARD: card}
    if plan.index_text is not None:
        texts[INDEX] = plan.index_text
    for name, text in texts.items():
        sums[name] = out.write(name, text.encode())
    config = plan.config_text.encode()
    sums[CONFIG] = hashlib.sha256(config).hexdigest()
    out.write(MANIFEST, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode())
    out.write(CONFIG, config)


def _source_card(root: Path) -> str:
    try:
        return read_small(confined(root, CARD), MAX_CONFIG_BYTES).decode(errors="replace")
    except SourceError:
        return ""


def _report(run: Run, out: Destination, buffers: Sequence[WorkerMemory], resumed: int) -> Report:
    plan, kinds = run.plan, gather(out.done.values())
    seconds = time.monotonic() - run.begun
    kept = sum(not item.decision.quantize for item in plan.selection.tensors)
    timings: defaultdict[str, float] = defaultdict(float)
    for buffer in buffers:
        for phase, spent in buffer.seconds.items():
            timings[phase] += spent
    timings["wait"] = max(0.0, seconds * len(buffers) - sum(timings.values()))
    reports = kind_reports(plan, kinds)
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
        kept=kept,
        relative_error=total_error(kinds),
        kinds=reports,
        warnings=plan.warnings + suspicions(reports, calibrated=run.calibrated is not None),
        resumed_shards=resumed,
        seconds=seconds,
        peak_memory=peak_bytes(),
        timings=dict(timings),
    )


def plan(  # noqa: PLR0913 - one keyword for each option of the command
    source: str | Path,
    *,
    scheme: Scheme | None = None,
    method: str | None = None,
    ignore: Iterable[str] = (),
    targets: Iterable[str] = (),
    default_ignore: bool = True,
    calibration: str | Path | None = None,
    input_scales: str | Path | None = None,
    input_scales_kind: str | None = None,
    like: str | Path | None = None,
    hub: HubOptions | None = None,
) -> Plan:
    """Return what `convert` with the same arguments would do, from headers alone; raises what it would raise."""
    settings = Settings(Rules(tuple(ignore), tuple(targets), default_ignore), method, scheme)
    return make_plan(source, settings, InputScaleSource(input_scales, input_scales_kind, calibration, like), hub)
