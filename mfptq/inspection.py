"""What a checkpoint holds, and what a plan would make of one, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint.folder import Checkpoint
from .checkpoint.header import TensorInfo
from .checkpoint.hub import HubOptions, open_checkpoint
from .checkpoint.weights import name_pattern
from .nvfp4 import BLOCK_SIZE
from .planning.plan import Plan
from .planning.quantization_config import QUANTIZATION_CONFIG
from .planning.rules import TensorDecision


@dataclass(frozen=True, slots=True)
class TensorKind:
    """Tensors whose names differ in numbers only: how many, their dtype, bytes, and what is said of them."""

    kind: str
    count: int
    dtype: str
    elements: int
    source_bytes: int
    output_bytes: int
    action: str
    reason: str
    method: str = ""

    @property
    def bits(self) -> float:
        """Bits for each element in the output."""
        return self.output_bytes * 8 / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint's contents by kind of tensor; `quantization` is None for an unquantized one."""

    origin: str
    shards: int
    tensors: int
    tensor_bytes: int
    quantization: Mapping[str, Any] | None
    kinds: tuple[TensorKind, ...]


def inspect(path: str | Path, hub: HubOptions | None = None) -> Inspection:
    """Return what a checkpoint holds; reads headers, index and config only. Raises SourceError or HubError."""
    checkpoint = open_checkpoint(path, hub)
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


def _stored(info: TensorInfo) -> TensorKind:
    elements = 1
    for size in info.shape:
        elements *= size
    name = name_pattern(info.name)
    return TensorKind(name, 1, info.dtype, elements, info.nbytes, info.nbytes, "stored", "")


def plan_kinds(plan: Plan) -> tuple[TensorKind, ...]:
    """Return what becomes of each kind of tensor, and why."""
    return tuple(_merged(_planned(item, plan) for item in plan.selection.tensors))


def _planned(item: TensorDecision, plan: Plan) -> TensorKind:
    kind = _stored(item.candidate.tensor.info)
    if not item.decision.quantize:
        return TensorKind(
            kind.kind, 1, kind.dtype, kind.elements, kind.source_bytes, kind.source_bytes, "keep", item.decision.reason
        )
    scalars = (4 if plan.input_scales is None else 8) * len(item.candidate.weights)
    size = kind.elements // 2 + kind.elements // BLOCK_SIZE + scalars
    methods = ", ".join(sorted({plan.method_of(weight) for weight in item.candidate.weights}))
    return TensorKind(
        kind.kind, 1, kind.dtype, kind.elements, kind.source_bytes, size, "NVFP4", item.decision.reason, methods
    )


def _merged(rows: Iterable[TensorKind]) -> Iterator[TensorKind]:
    merged: dict[tuple[str, ...], TensorKind] = {}
    for row in rows:
        key = (row.kind, row.dtype, row.action, row.reason, row.method)
        old = merged.get(key)
        merged[key] = row if old is None else TensorKind(
            row.kind, old.count + 1, row.dtype, old.elements + row.elements, old.source_bytes + row.source_bytes,
            old.output_bytes + row.output_bytes, row.action, row.reason, row.method,
        )  # fmt: skip
    yield from sorted(merged.values(), key=lambda row: (-row.source_bytes, row.kind))
