"""Sum up what a checkpoint holds, and what a plan would make of it, from headers alone.

`inspect` is public; the command line's tables use `plan_patterns`. No weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.companions import FileChoice
from .checkpoint.encoding import Encoding
from .checkpoint.folder import Checkpoint
from .checkpoint.header import TensorInfo
from .checkpoint.weights import StoredTensor, name_pattern
from .dtypes import DTYPE_BITS
from .encodings.contents import read_contents
from .encodings.fp4 import MXFP4
from .errors import SourceError
from .hub.opening import HubOptions, open_checkpoint
from .planning.formats import FORMATS, QUANTIZATION_CONFIG
from .planning.jobs import CAST
from .planning.rules import TensorDecision

if TYPE_CHECKING:
    from .planning.plan import ConversionPlan
    from .planning.weight_targets import WeightRun


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """Tensors whose names differ in numbers only, written with "*": how many, their bytes, and what becomes of them.

    `rule` is the pattern that decided, "" where none did; `action`, `rule`, `reason` and `method` say nothing in an
    inspection.
    """

    pattern: str
    count: int
    dtype: str
    elements: int
    source_bytes: int
    output_bytes: int
    action: str = "stored"
    rule: str = ""
    reason: str = ""
    method: str = ""

    @property
    def bits(self) -> float:
        """Bits for each element in the output."""
        return self.output_bytes * 8 / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint's contents by pattern of tensor names; `quantization` is None for an unquantized one.

    `notes` say what its weights are stored as, or why they cannot be read.
    """

    origin: str
    shards: int
    tensors: int
    tensor_bytes: int
    quantization: Mapping[str, Any] | None
    patterns: tuple[TensorSummary, ...]
    notes: tuple[str, ...] = ()


def inspect(
    path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    follow_links: bool = False,
) -> Inspection:
    """Return what a checkpoint, a folder or a Hub repo, holds; reads headers, index and config only.

    `follow_links`: the files of a folder may be links that lead out of it.

    Raises SourceError or HubError.
    """
    checkpoint = open_checkpoint(path, HubOptions(revision, token, cache_dir), FileChoice(follow_links=follow_links))
    try:
        return _inspection(checkpoint)
    finally:
        checkpoint.source.close()


def _inspection(checkpoint: Checkpoint) -> Inspection:
    rows = [_stored(stored.info) for stored in checkpoint.tensors()]
    found = checkpoint.config.get(QUANTIZATION_CONFIG)
    return Inspection(
        str(checkpoint.origin),
        len(checkpoint.shards),
        len(rows),
        checkpoint.tensor_bytes,
        found if isinstance(found, dict) else None,
        tuple(_merged(rows)),
        _notes(checkpoint),
    )


def _notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    try:
        return read_contents(checkpoint).notes
    except SourceError as error:
        return (f"it cannot be converted: {error}",)


def _stored(info: TensorInfo) -> TensorSummary:
    return TensorSummary(name_pattern(info.name), 1, info.dtype, math.prod(info.shape), info.nbytes, info.nbytes)


def _source_bytes(tensor: StoredTensor) -> int:
    """Return the bytes that a tensor takes in the source, its codes and all their scales together."""
    if tensor.encoding is None:
        return tensor.info.nbytes
    return sum(part.info.nbytes for part in tensor.encoding.parts if part is not None)


def plan_patterns(plan: ConversionPlan) -> tuple[TensorSummary, ...]:
    """Return what becomes of each pattern of tensor names, and why."""
    return tuple(_merged(planned_summary(item, plan) for item in plan.selection.tensors))


def planned_summary(item: TensorDecision, plan: ConversionPlan) -> TensorSummary:
    """Return what becomes of one tensor, how it is stored, and why."""
    decision, stored, tensor = item.decision, _stored(item.candidate.tensor.info), item.candidate.tensor
    stored = replace(stored, source_bytes=_source_bytes(tensor), reason=plan.reason(item), rule=decision.rule)
    if not decision.quantize:
        codes = _codes(tensor.encoding)
        return replace(stored, action="keep", reason=stored.reason + (f", widened from {codes}" if codes else ""))
    runs = plan.runs_of(item)
    new = [run for run in runs if run.weights[0].module not in plan.carried.weights]
    return replace(
        stored,
        output_bytes=sum(run.weight_bytes * len(run.weights) for run in runs),
        action=FORMATS[decision.format].label,
        reason=stored.reason + (_decoding(new[0]) if new else ""),
        method=", ".join(sorted({run.target.method for run in new})),
    )


def _codes(encoding: Encoding | None) -> str:
    """Return what codes values are stored as, scaled by smoothing or not; "" where they are stored as they are."""
    return "" if encoding is None or encoding.format in DTYPE_BITS else encoding.format


def _decoding(run: WeightRun) -> str:
    """Return what is said of weights that are stored as codes."""
    (target, method), codes = run.target, _codes(run.weights[0].encoding)
    if not codes:
        return ""
    if method == CAST and target.family == "fp8":
        return f", {codes} (lossless: codes go over as they are)"
    if method == CAST:
        return f", cast from {codes} (lossless where exponents span at most 17: codes go over as they are)"
    fits = codes == MXFP4 and target.family == "nvfp4" and method != "minmax"
    return f", decoded from {codes}" + (" (lossless where exponents span at most 14)" if fits else "")


def _merged(rows: Iterable[TensorSummary]) -> Iterator[TensorSummary]:
    merged: dict[tuple[str, ...], TensorSummary] = {}
    for row in rows:
        key = (row.pattern, row.dtype, row.action, row.rule, row.reason, row.method)
        old = merged.get(key)
        merged[key] = row if old is None else replace(
            row, count=old.count + 1, elements=old.elements + row.elements,
            source_bytes=old.source_bytes + row.source_bytes, output_bytes=old.output_bytes + row.output_bytes,
        )  # fmt: skip
    yield from sorted(merged.values(), key=lambda row: (-row.source_bytes, row.pattern))
