"""Sum up a run: the errors of each pattern of modules, warnings, and the report that stays with the output.

Called by `execution.whole_run`, `output.finish` and the model card; `stored_report` reads it back. What is written must not
depend on how the run went.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..checkpoint.strict_json import StrictJsonError, dump_json, parse_json
from ..checkpoint.weights import layer_pattern, name_pattern
from ..errors import SourceError
from ..kernels import ErrorStats
from ..limits import MAX_INDEX_BYTES
from ..planning.formats import FORMATS
from ..storage.files import read_small
from .claim import REPORT
from .journal import ShardResult

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan

LAYER_COLUMNS = (
    "name", "elements", "relative_error", "worst_block", "zeroed", "saturated_blocks", "zero_blocks", "checksum",
    "source_bytes", "output_bytes",
)  # fmt: skip
SUSPICIOUS_ERROR = 0.10
SUSPICIOUS_BLOCK = 0.20
SUSPICIOUS_CALIBRATED_ERROR = 0.20  # methods that spare the outputs let the weights' own errors grow


@dataclass(frozen=True, slots=True)
class PatternReport:
    """Modules whose names differ in numbers only, written with "*": how many weights, and the error they took."""

    pattern: str
    format: str
    weights: int
    elements: int
    relative_error: float
    worst_block: float
    zeroed: float


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a conversion. Sizes are in bytes; errors are relative Frobenius norms of weights.

    `left_out`: files of the source that were not taken, with their sizes; `fetched_bytes`: what came from the Hub;
    `unchecked_files`: how many shards this run read there without comparing their SHA-256, as they did not come whole and in order;
    `published`: the address of the commit, where the output was pushed; `smoothed`: how many weights have smoothed inputs.
    `already_complete`: an earlier run had done everything, and its files proved intact.
    """

    source: str
    destination: str
    scheme: str
    formats: Mapping[str, int]
    method: str
    kernel: str
    device_reason: str
    source_bytes: int
    output_bytes: int
    tensors: int
    quantized: int
    kept: int
    relative_error: float
    patterns: tuple[PatternReport, ...]
    warnings: tuple[str, ...]
    resumed_shards: int
    seconds: float
    peak_memory: int
    timings: Mapping[str, float]
    already_complete: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)
    fetched_bytes: int = 0
    unchecked_files: int = 0
    published: str = ""
    smoothed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def gather(results: Iterable[ShardResult]) -> dict[str, ErrorStats]:
    """Return the statistics of all shards by format and layer, as `stats_key` writes them."""
    statistics: dict[str, ErrorStats] = {}
    for result in sorted(results, key=lambda result: result.name):
        for pattern, values in result.kinds.items():
            statistics.setdefault(pattern, ErrorStats()).add(ErrorStats(**values))  # type: ignore[arg-type]
    return statistics


def by_pattern(statistics: Mapping[str, ErrorStats]) -> dict[tuple[str, str], ErrorStats]:
    """Return the statistics of layers together, by pattern of module names and format."""
    merged: dict[tuple[str, str], ErrorStats] = {}
    for key, stats in statistics.items():
        target, _, name = key.partition(" ")
        merged.setdefault((name_pattern(name), target), ErrorStats()).add(stats)
    return merged


def pattern_reports(plan: ConversionPlan, statistics: Mapping[str, ErrorStats]) -> tuple[PatternReport, ...]:
    """Return a line for each pattern of module names, in their order."""
    counts = Counter((plan.format_of(weight).name, name_pattern(weight.module)) for weight in plan.weights())
    return tuple(
        PatternReport(
            pattern,
            target,
            counts[target, pattern],
            stats.weights,
            *_errors(stats),
        )
        for (pattern, target), stats in sorted(by_pattern(statistics).items())
    )


def total_error(statistics: Mapping[str, ErrorStats]) -> float:
    """Return the relative error over all quantized weights together."""
    total = ErrorStats()
    for stats in statistics.values():
        total.add(stats)
    return _rounded(total.relative_error)


def suspicions(reports: Iterable[PatternReport], *, calibrated: bool = False) -> tuple[str, ...]:
    """Return a warning for each pattern whose error no sound weight has; calibrated methods may err more on weights."""
    error, block = (SUSPICIOUS_CALIBRATED_ERROR, math.inf) if calibrated else (SUSPICIOUS_ERROR, SUSPICIOUS_BLOCK)
    return tuple(
        f"{report.pattern}: relative error {report.relative_error:.1%}, worst block {report.worst_block:.1%}: look at these weights"
        for report in reports
        if report.relative_error > error or report.worst_block > block
    )


def layer_sizes(plan: ConversionPlan) -> dict[str, tuple[int, int]]:
    """Return the bytes of each layer and kind of module before, as plain values, and after, all its tensors together."""
    sizes: dict[str, tuple[int, int]] = {}
    for run in plan.runs():
        size = run.weight_bytes
        for weight in run.weights:
            name = layer_pattern(weight.module)
            before, after = sizes.get(name, (0, 0))
            sizes[name] = before + weight.nbytes, after + size
    return sizes


def layer_rows(statistics: Mapping[str, ErrorStats], sizes: Mapping[str, tuple[int, int]]) -> list[list[Any]]:
    """Return a short row for each layer and kind of module, in name order, with the columns of LAYER_COLUMNS."""
    layers: dict[str, ErrorStats] = {}
    for key, found in statistics.items():
        layers.setdefault(key.partition(" ")[2], ErrorStats()).add(found)
    return [
        [
            name,
            stats.weights,
            *_errors(stats),
            stats.saturated_blocks,
            stats.zero_blocks,
            f"{stats.checksum:016x}",
            *sizes.get(name, (0, 0)),
        ]
        for name, stats in sorted(layers.items())
    ]


def stored_report(output: Path) -> Mapping[str, Any]:
    """Return the report in an output's folder, empty where there is none or a damaged one."""
    try:
        found = parse_json(read_small(output / REPORT, MAX_INDEX_BYTES))
    except (SourceError, StrictJsonError):
        return {}
    return found if isinstance(found, dict) else {}


def recorded_checksums(output: Path) -> dict[str, int]:
    """Return the checksum of the values that each layer was made from, by name, as the output's report has them.

    Empty where there is no such report, or one of an earlier version.
    """
    try:
        rows = stored_report(output).get("layers") or ()
        return {row[0]: int(row[LAYER_COLUMNS.index("checksum")], 16) for row in rows}
    except (TypeError, ValueError, IndexError, KeyError):
        return {}


def tensor_rows(plan: ConversionPlan) -> list[list[Any]]:
    """Return what became of each pattern of source tensors and why, large ones first: name, action, count, bytes, rule, reason."""
    sums: dict[tuple[str, str, str, str], list[int]] = {}
    for item in plan.selection.tensors:
        info, decision = item.candidate.tensor.info, item.decision
        action = FORMATS[decision.format].label if decision.quantize else "keep"
        row = sums.setdefault((name_pattern(info.name), action, decision.rule, plan.reason(item)), [0, 0])
        row[0] += 1
        row[1] += info.nbytes
    ordered = sorted(sums.items(), key=lambda each: (-each[1][1], each[0]))
    return [[pattern, action, *row, rule, reason] for (pattern, action, rule, reason), row in ordered]


def _errors(stats: ErrorStats) -> tuple[float, float, float]:
    """Return the relative error, that of the worst block, and the share of values that became zero."""
    zeroed = stats.zeroed / stats.weights if stats.weights else 0.0
    return _rounded(stats.relative_error), _rounded(stats.worst_block), _rounded(zeroed)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def report_text(plan: ConversionPlan, statistics: Mapping[str, ErrorStats]) -> str:
    """Return the report that stays with the output: the same text for the same plan, wherever and however it ran."""
    origin = plan.checkpoint.origin
    return dump_json({
        "tool": "mfptq",
        "version": __version__,
        "source": {"repo_id": origin.repo_id, "revision": origin.revision},
        "scheme": plan.scheme,
        "formats": dict(sorted(plan.formats.items())),
        "method": plan.method,
        "methods": dict(sorted(plan.methods.items())),
        "calibration": plan.calibration.digest if plan.calibration else None,
        "plan": plan.digest,
        "source_bytes": plan.checkpoint.tensor_bytes,
        "output_bytes": plan.tensor_bytes,
        "input_scales": plan.input_scales.about if plan.input_scales else None,
        "input_scales_filled": plan.input_scales.filled if plan.input_scales else None,
        "smoothing": plan.smoothing.as_dict() if plan.smoothing else None,
        "relative_error": total_error(statistics),
        "patterns": [asdict(report) for report in pattern_reports(plan, statistics)],
        "layers": layer_rows(statistics, layer_sizes(plan)),
        "tensors": tensor_rows(plan),
        "shards": {shard.name: shard.digest for shard in plan.checkpoint.shards},
    })  # fmt: skip
