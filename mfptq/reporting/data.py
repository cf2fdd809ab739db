"""Read an output's mfptq_report.json as rows: one for each layer and kind of module, one for each pattern of tensors.

Called by `reporting.page`, `reporting.compare` and the command line. Raises SourceError for what is no report.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

from ..checkpoint.small_files import read_object
from ..checkpoint.source import FolderSource
from ..checkpoint.weights import name_pattern
from ..errors import SourceError, counted, quote
from ..limits import MAX_INDEX_BYTES
from ..output.claim import REPORT
from ..output.evaluations import read_evaluations
from ..output.measured import Measured, total
from ..storage.files import expanded

FAR_OFF = 1.25  # times the median error of a kind in one format: a layer to look at
WORST_BLOCK = 0.25  # relative error of one block of 16


@dataclass(frozen=True, slots=True)
class LayerRow:
    """The weights of one layer and kind: their number of elements, and the errors that quantizing them made.

    `relative_error` is the Frobenius norm of the difference over that of the weights, `worst_block` that of the worst 16
    values, `zeroed` the share of values that became zero, `saturated_blocks` and `zero_blocks` counts of blocks;
    `checksum` tells the values before from others, `source_bytes` and `output_bytes` are sizes before and after; "" and 0 in
    reports of earlier versions.
    """

    name: str
    elements: int
    relative_error: float
    worst_block: float
    zeroed: float
    saturated_blocks: int
    zero_blocks: int
    checksum: str = ""
    source_bytes: int = 0
    output_bytes: int = 0

    @property
    def is_fp8(self) -> bool:
        """Whether it became FP8, not NVFP4, by its size: 8 bits a weight and scales, or 4 and scales."""
        return self.output_bytes * 8 > 6 * self.elements

    @property
    def layer(self) -> int | None:
        """The layer's number, None for what is in no numbered layer."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), None)

    @property
    def pattern(self) -> str:
        """The kind of module: the name with every number as `*`."""
        return name_pattern(self.name)

    @property
    def kind(self) -> str:
        """The kind as people call it: what follows the layer's number."""
        _, found, rest = self.pattern.partition("*.")
        return rest if found else self.pattern


@dataclass(frozen=True, slots=True)
class TensorRow:
    """What became of source tensors whose names have one pattern, and why."""

    pattern: str
    action: str
    count: int
    source_bytes: int
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class KindRow:
    """All layers of one kind of module: how many, sizes before and after, the least, median and largest error.

    `outputs` are the same three of the layers' outputs, where they are known.
    """

    kind: str
    layers: int
    source_bytes: int
    output_bytes: int
    least: float
    median: float
    largest: float
    outputs: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class ReportData:
    """A report: `summary` holds the values of the whole output, `flagged` the names of layers to look at, with reasons.

    `evaluations` are those that the output's folder holds, as JSON values; `measured` is what comparing layers with the source
    has shown, by name, where that was done.
    """

    summary: Mapping[str, Any]
    layers: tuple[LayerRow, ...]
    tensors: tuple[TensorRow, ...]
    flagged: Mapping[str, str]
    evaluations: Sequence[Mapping[str, Any]] = ()
    measured: Mapping[str, Measured] = field(default_factory=dict)

    @property
    def calibrated(self) -> bool:
        """Whether calibration statistics shaped the weights, so that errors of outputs went down, not of weights."""
        return bool(self.summary.get("calibration"))

    @property
    def blocks(self) -> Sequence[int]:
        """How many blocks of 16 values have which error, in bins; nothing where they were not measured."""
        return total(list(self.measured.values())).blocks if self.measured else ()

    def output_error(self, name: str) -> float | None:
        """The expected relative error of a layer's output; None where nothing is known of its inputs."""
        found = self.measured.get(name)
        return None if found is None else found.relative_output_error

    @property
    def has_output_errors(self) -> bool:
        """Whether the error of any layer's output is known."""
        return any(each.output_norm for each in self.measured.values())


def by_kind(report: ReportData) -> tuple[KindRow, ...]:
    """Return a row for each kind of module, the largest first."""
    kinds: dict[str, list[LayerRow]] = {}
    for row in report.layers:
        kinds.setdefault(row.kind, []).append(row)
    rows = [_kind_row(kind, layers, report) for kind, layers in kinds.items()]
    return tuple(sorted(rows, key=lambda row: (-row.source_bytes, row.kind)))


def _kind_row(kind: str, layers: list[LayerRow], report: ReportData) -> KindRow:
    errors = [row.relative_error for row in layers]
    before, after = sum(row.source_bytes for row in layers), sum(row.output_bytes for row in layers)
    known = [error for row in layers if (error := report.output_error(row.name)) is not None]
    outputs = (min(known), median(known), max(known)) if known else None
    return KindRow(kind, len(layers), before, after, min(errors), median(errors), max(errors), outputs)


def read_report(output: str | Path) -> ReportData:
    """Return the report that a conversion left in its output folder; raises SourceError for none, or one without layers."""
    folder = expanded(output)
    if not (folder / REPORT).is_file():
        raise SourceError(f"{quote(output)} is no finished output of mfptq: it holds no {REPORT}")
    source = FolderSource(folder)
    try:
        content = read_object(source, REPORT, MAX_INDEX_BYTES)
    finally:
        source.close()
    layers, tensors = content.get("layers"), content.get("tensors")
    if content.get("tool") != "mfptq" or not isinstance(layers, list) or not isinstance(tensors, list):
        raise SourceError(f"{quote(REPORT)} of {quote(output)} has no errors by layer: convert again with this version")
    try:
        rows = tuple(LayerRow(*row) for row in layers)
        kinds = tuple(TensorRow(*row) for row in tensors)
        flagged = _flagged(rows, calibrated=bool(content.get("calibration")))
        return ReportData(content, rows, kinds, flagged, read_evaluations(folder))
    except (TypeError, ValueError, AttributeError):
        raise SourceError(
            f"{quote(REPORT)} of {quote(output)} is damaged: its rows are not those of a report"
        ) from None


def _flagged(rows: tuple[LayerRow, ...], *, calibrated: bool) -> dict[str, str]:
    """Return why layers deserve a look: an error far above the median of their kind and format, a bad block, saturation."""
    kinds: dict[tuple[str, bool], list[float]] = {}
    for row in rows:
        kinds.setdefault((row.pattern, row.is_fp8), []).append(row.relative_error)
    flagged: dict[str, str] = {}
    for row in rows:
        usual = median(kinds[row.pattern, row.is_fp8])
        reasons = []
        if usual and row.relative_error > FAR_OFF * usual:
            reasons.append(f"error {row.relative_error / usual:.2f} times the median of its kind")
        if row.worst_block > WORST_BLOCK and not calibrated:
            reasons.append(f"worst block {row.worst_block:.0%}")
        if row.saturated_blocks:
            reasons.append(counted(row.saturated_blocks, "saturated block", "saturated blocks"))
        if reasons:
            flagged[row.name] = ", ".join(reasons)
    return flagged


def csv_text(report: ReportData) -> str:
    """Return the layers as CSV with a line of names first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [each.name for each in fields(LayerRow)]
    writer.writerow(["layer", "kind", *names, "flagged", *(["output_error"] if report.has_output_errors else [])])
    for row in report.layers:
        known = [report.output_error(row.name)] if report.has_output_errors else []
        writer.writerow([row.layer, row.kind, *astuple(row), report.flagged.get(row.name, ""), *known])
    return text.getvalue()
