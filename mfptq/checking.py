"""Check a quantized checkpoint, whoever made it, as inference engines would: from headers, config, and scales.

The public face of `engines`. It decodes no weight, writes nothing, and shares no rule with the code that converts.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.folder import Checkpoint
from .checkpoint.small_files import read_object
from .checkpoint.weights import StoredTensor
from .engines.block_scales import block_faults
from .engines.files import HF_QUANT_CONFIG, file_faults
from .engines.findings import Fault, Finding, gathered
from .engines.judge import QUANTIZATION_CONFIG, Subject, structure_faults, view
from .engines.scales import SCALES, partner_faults, value_faults
from .engines.schemes import Shape
from .engines.serving import Serving, serving_faults
from .engines.tables import ENGINE_TITLES, ENGINES, Engine
from .errors import UsageError, quote
from .hub.opening import HubOptions, open_checkpoint
from .limits import MAX_CONFIG_BYTES

if TYPE_CHECKING:
    from .planning.plan import ConversionPlan

NEAR_BYTES = 64 * 2**10  # small tensors no further apart are read at once
_FORMATS = {"F32": "<f", "F16": "<e", "F64": "<d"}


@dataclass(frozen=True, slots=True)
class Check:
    """What was found; `tensors` is their number, `seconds` the time it took."""

    findings: tuple[Finding, ...]
    tensors: int
    engines: tuple[str, ...]
    seconds: float

    @property
    def errors(self) -> int:
        """Number of findings that are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def ok(self) -> bool:
        """Whether no error was found."""
        return not self.errors

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "ok": self.ok,
            "errors": self.errors,
            "warnings": len(self.findings) - self.errors,
            "tensors": self.tensors,
            "engines": list(self.engines),
            "seconds": self.seconds,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def check(
    path: str | Path,
    *,
    engines: Sequence[Engine] = ENGINES,
    serving: Serving | None = None,
    source: str | Path | None = None,
    block_scales: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Check:
    """Return what engines would find wrong with the checkpoint at `path`, a folder or a Hub repo.

    `serving` says how the model will run: then it is also judged whether it can be split and fits into memory.
    `block_scales` are read too, a byte for 16 weights: by default where the files are local. With `source`, what it was made
    from, blocks that were lost are found as well; a revision of it follows its name, as in `hf://org/name@revision`.
    Raises UsageError for an engine that is not known, SourceError for files that are no checkpoint, and HubError.
    """
    start, hub = time.monotonic(), HubOptions(revision, token, cache_dir)
    with ExitStack() as opened:
        checkpoint = open_checkpoint(path, hub)
        opened.callback(checkpoint.source.close)
        original = None
        if source is not None:
            original = open_checkpoint(source, replace(hub, revision=None))
            opened.callback(original.source.close)
        subject, more = read_subject(checkpoint), [*_index_faults(checkpoint)]
        if block_scales or original is not None or (block_scales is None and not checkpoint.source.is_remote):
            more += block_faults(checkpoint, subject.stored, original)
        found = judge(subject, engines, serving=serving, more=more)
    return Check(found, len(subject.tensors), tuple(engines), time.monotonic() - start)


def judge(
    subject: Subject,
    engines: Sequence[Engine] = ENGINES,
    *,
    serving: Serving | None = None,
    more: Iterable[Fault] = (),
) -> tuple[Finding, ...]:
    """Return what engines would find wrong with tensors and a config, which need not be written yet.

    A plan is judged with the tensors that it will write and the config.json that it will have. What no engine depends
    on is found once, with an empty `engine`; `more` are faults that the caller found.
    """
    faults: list[Fault] = [*file_faults(subject), *value_faults(subject), *more]
    if serving is not None:
        faults += serving_faults(subject, serving)
    for engine in engines:
        if engine not in ENGINES:
            raise UsageError(f"engine {quote(engine)} is unknown, expected one of {', '.join(ENGINES)}")
        seen = view(subject, engine)
        faults += structure_faults(seen)
        faults += partner_faults(seen)
    return gathered(faults)


def check_plan(plan: ConversionPlan, engines: Sequence[Engine] = ENGINES) -> tuple[Finding, ...]:
    """Return what engines would find wrong with the output of a plan, before a byte of it is written."""
    return judge(planned_subject(plan), engines)


def planned_subject(plan: ConversionPlan) -> Subject:
    """Return what engines will be given of a plan's output."""
    files = ("config.json", *plan.checkpoint.companions)
    tensors, alike = _planned(plan)
    given = plan.input_scales.global_scales if plan.input_scales is not None else {}
    grouped = ((weight.module, plan.group_of(weight).name) for weight in (plan.weights() if given else ()))
    scalars = {f"{module}.input_global_scale": given[group] for module, group in grouped if group in given}
    return Subject(json.loads(plan.config_text), tensors, files, scalars, alike)


def _planned(plan: ConversionPlan) -> tuple[dict[str, Shape], dict[str, list[str]]]:
    """Return the tensors that a plan will write, of experts that become the same those of the first, and who these are."""
    tensors: dict[str, Shape] = {}
    alike: dict[str, list[str]] = {}
    for item in plan.selection.tensors:
        info = item.candidate.tensor.info
        if not item.decision.quantize:
            tensors[info.name] = Shape(info.dtype, info.shape)
        for run in plan.runs_of(item):
            projections: dict[str, list[str]] = {}
            for weight in run.weights:
                projections.setdefault(weight.module.rpartition(".")[2], []).append(weight.module)
            for modules in projections.values():
                alike[modules[0]] = modules
                tensors |= {f"{modules[0]}.{each.suffix}": Shape(each.dtype, each.shape) for each in run.tensors}
    return tensors, alike


def unloadable(findings: Iterable[Finding], engines: Sequence[Engine]) -> tuple[Finding, ...]:
    """Return the errors of an engine, the first of `engines`, if every one of them has some; else nothing.

    What no engine depends on is the source's own state, and no reason to stop a conversion; nor is what is said of a class
    that an engine does not know.
    """
    found = list(findings)
    errors: list[tuple[Finding, ...]] = []
    for engine in engines:
        own = [each for each in found if ENGINE_TITLES[engine] in each.engine]
        known = not any(each.code == "unknown-architecture" for each in own)
        errors.append(tuple(each for each in own if known and each.severity == "error"))
    return errors[0] if errors and all(errors) else ()


def read_subject(checkpoint: Checkpoint) -> Subject:
    """Return what engines are given of a checkpoint; reads the values of its global scales and input scales."""
    stored = {tensor.info.name: tensor for tensor in checkpoint.tensors()}
    files = tuple(checkpoint.source.files())
    config = dict(checkpoint.config)
    if QUANTIZATION_CONFIG not in config and HF_QUANT_CONFIG in files:
        found = read_object(checkpoint.source, HF_QUANT_CONFIG, MAX_CONFIG_BYTES)
        config[QUANTIZATION_CONFIG] = {"quant_method": "modelopt", **found}
    shapes = {name: Shape(tensor.info.dtype, tensor.info.shape) for name, tensor in stored.items()}
    return Subject(config, shapes, files, _scalars(checkpoint, stored.values()))


def _scalars(checkpoint: Checkpoint, tensors: Iterable[StoredTensor]) -> Mapping[str, float]:
    """Return the values of global scales and input scales by name; neighbours in a file are read together."""
    wanted = [each for each in tensors if _is_scalar(each)]
    wanted.sort(key=lambda each: (each.shard, each.offset))
    values: dict[str, float] = {}
    for shard, rows in groupby(wanted, key=lambda each: each.shard):
        for run in _runs(list(rows)):
            start = run[0].offset
            data = bytearray(run[-1].offset + run[-1].info.nbytes - start)
            checkpoint.source.read_into(shard, start, memoryview(data))
            for each in run:
                first = each.offset - start
                values[each.info.name] = _number(each.info.dtype, bytes(data[first : first + each.info.nbytes]))
    return values


def _is_scalar(tensor: StoredTensor) -> bool:
    suffix = tensor.info.name.rpartition(".")[2]
    return suffix in SCALES and tensor.info.shape in ((), (1,)) and tensor.info.dtype in (*_FORMATS, "BF16")


def _runs(tensors: list[StoredTensor]) -> Iterable[list[StoredTensor]]:
    run = tensors[:1]
    for before, each in pairwise(tensors):
        if each.offset - before.offset > NEAR_BYTES:
            yield run
            run = []
        run.append(each)
    yield run


def _number(dtype: str, data: bytes) -> float:
    if dtype == "BF16":
        dtype, data = "F32", bytes(2) + data  # BF16 is the upper half of a float32
    return float(struct.unpack(_FORMATS[dtype], data)[0])


def _index_faults(checkpoint: Checkpoint) -> Iterable[Fault]:
    """Yield safetensors files that the index does not name: engines leave them out."""
    for name in checkpoint.left_out:
        if name.endswith(".safetensors"):
            yield Fault(
                "not-in-index", "warning", "", name, "a safetensors file is not named by the index",
                "engines do not load its tensors", "add them to model.safetensors.index.json",
            )  # fmt: skip
