"""Sum up what a checkpoint holds, and what a plan would make of it, from headers alone.

`inspect` is public; the command line's tables use `plan_patterns`. No weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.folder import Checkpoint
from .checkpoint.header import TensorInfo
from .checkpoint.hub import HubOptions, open_checkpoint
from .checkpoint.weights import name_pattern
from .nvfp4 import BLOCK_SIZE
from .planning.quantization_config import QUANTIZATION_CONFIG
from .planning.rules import TensorDecision

if TYPE_CHECKING:
    from .planning.plan import ConversionPlan


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
    """A checkpoint's contents by pattern of tensor names; `quantization` is None for an unquantized one."""

    origin: str
    shards: int
    tensors: int
    tensor_bytes: int
    quantization: Mapping[str, Any] | None
    patterns: tuple[TensorSummary, ...]


def inspect(
    path: str | Path, *, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None
) -> Inspection:
    """Return what a checkpoint, a folder or a Hub repo, holds; reads headers, index and config only.

    Raises SourceError or HubError.
    """
    checkpoint = open_checkpoint(path, HubOptions(revision, token, cache_dir))
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
    )


def _stored(info: TensorInfo) -> TensorSummary:
    return TensorSummary(name_pattern(info.name), 1, info.dtype, math.prod(info.shape), info.nbytes, info.nbytes)


def plan_patterns(plan: ConversionPlan) -> tuple[TensorSummary, ...]:
    """Return what becomes of each pattern of tensor names, and why."""
    return tuple(_merged(_planned(item, plan) for item in plan.selection.tensors))


def _planned(item: TensorDecision, plan: ConversionPlan) -> TensorSummary:
    decision, stored = item.decision, _stored(item.candidate.tensor.info)
    if not decision.quantize:
        return replace(stored, action="keep", rule=decision.rule, reason=decision.reason)
    scalars = (4 if plan.input_scales is None else 8) * len(item.candidate.weights)
    return replace(
        stored,
        output_bytes=stored.elements // 2 + stored.elements // BLOCK_SIZE + scalars,
        action="NVFP4",
        rule=decision.rule,
        reason=decision.reason,
        method=", ".join(sorted({plan.method_of(weight) for weight in item.candidate.weights})),
    )


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
