"""Compare two outputs of mfptq: which layers only one of them quantizes, and how errors differ.

Called by the command `compare`. It reads the reports of both, and no weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from ..output.estimates import Estimate
from ..output.evaluations import paired_difference
from ..output.measured import Measured, total
from .data import LayerRow, ReportData

SAME = 0.005  # a relative difference of errors below half a per cent is noise of methods


@dataclass(frozen=True, slots=True)
class Difference:
    """One layer and kind in two outputs: the error in each, None where the output keeps it unquantized."""

    name: str
    elements: int
    first: float | None
    second: float | None

    @property
    def change(self) -> float | None:
        """The second error over the first, less one; None where one of the two keeps the layer."""
        if self.first is None or self.second is None or not self.first:
            return None
        return self.second / self.first - 1


@dataclass(frozen=True, slots=True)
class ScaleDifference:
    """One kind of scale in two outputs: modules that have it in both, how many differ, and the largest ratio of two."""

    kind: str
    modules: int
    different: int
    ratio: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A text that both outputs were evaluated on: the KL divergence of each, and the difference, taken window by window."""

    dataset: str
    first: float
    second: float
    difference: Estimate


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two outputs side by side. `treated` are layers that only one quantizes, `changed` those whose errors differ."""

    first_error: float
    second_error: float
    first_bytes: int
    second_bytes: int
    treated: tuple[Difference, ...]
    changed: tuple[Difference, ...]
    equal: int
    scales: tuple[ScaleDifference, ...] = ()
    evaluated: tuple[Evaluated, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return asdict(self)


def compare(first: ReportData, second: ReportData) -> Comparison:
    """Return how two reports differ, layer by layer; the largest changes first."""
    one, other = ({row.name: row for row in report.layers} for report in (first, second))
    if not one or not other:
        one = other = {}  # all weights of one were NVFP4 in its source: nothing is known of their errors
    rows = [_difference(name, one.get(name), other.get(name)) for name in sorted(one.keys() | other.keys())]
    treated = tuple(row for row in rows if row.change is None and (row.first is None or row.second is None))
    changed = [row for row in rows if row.change is not None and abs(row.change) > SAME]
    changed.sort(key=lambda row: (-abs(row.change or 0), row.name))
    return Comparison(
        first.summary["relative_error"],
        second.summary["relative_error"],
        first.summary["output_bytes"],
        second.summary["output_bytes"],
        treated,
        tuple(changed),
        len(rows) - len(treated) - len(changed),
        evaluated=tuple(_evaluated(first, second)),
    )


def _evaluated(first: ReportData, second: ReportData) -> Iterator[Evaluated]:
    for one, other in product(first.evaluations, second.evaluations):
        difference = paired_difference(one, other)
        if difference is not None:
            before, after = (each["kl_divergence"]["value"] for each in (one, other))
            yield Evaluated(one["dataset"], before, after, difference)


def with_measured(report: ReportData, measured: Mapping[str, Measured]) -> ReportData:
    """Return a report with errors as they were measured against a source, in place of those that its conversion noted."""
    known = {row.name: row for row in report.layers}
    rows = [
        replace(known.get(name, LayerRow(name, 0, 0.0, 0.0, 0.0, 0, 0)), relative_error=each.relative_error)
        for name, each in measured.items()
    ]
    error = total(list(measured.values())).relative_error
    return replace(report, layers=tuple(rows), summary={**report.summary, "relative_error": error}, measured=measured)


def compare_scales(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[ScaleDifference, ...]:
    """Return how global scales and input scales of two checkpoints differ, by tensor name, a row for each kind of scale."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for name in sorted(first.keys() & second.keys()):
        pairs.setdefault(name.rpartition(".")[2], []).append((first[name], second[name]))
    return tuple(
        ScaleDifference(kind, len(found), sum(one != other for one, other in found), max(map(_ratio, found)))
        for kind, found in pairs.items()
    )


def _ratio(pair: tuple[float, float]) -> float:
    small, large = sorted(pair)
    return large / small if small > 0 else math.inf


def _difference(name: str, first: LayerRow | None, second: LayerRow | None) -> Difference:
    known = first or second
    assert known is not None
    return Difference(
        name, known.elements, first.relative_error if first else None, second.relative_error if second else None
    )
