"""Recognize an output folder that an earlier run of the very same plan has finished, so that a rerun has nothing to do.

Called by `execution.whole_run` before a run takes any memory, and by `execution.preview`. Removes what a power cut left of
the work folder, and writes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.companions import CONFIG
from ..errors import DestinationExistsError, MfptqError, quote
from .claim import JOURNAL, MANIFEST, REPORT, WORK
from .manifest import manifest_faults
from .report import PatternReport, Report, stored_report

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan


def finished_by(plan: ConversionPlan, root: Path, poll: Callable[[], object] | None = None) -> Mapping[str, Any] | None:
    """Return the report that lies in `root` if the plan is carried out there already, every file checked by content.

    None where there is no finished output. Raises DestinationExistsError if there is one of another plan, or a damaged one.
    """
    report = _finished_report(plan, root)
    if report is None:
        return None
    try:
        faults = [str(fault) for fault in manifest_faults(root, poll)[1]]
    except MfptqError as error:
        faults = [str(error)]
    if faults:
        raise DestinationExistsError(
            f"output {quote(root)} holds a finished conversion that is damaged: {faults[0]}; overwrite it to make it anew"
        )
    shutil.rmtree(root / WORK, ignore_errors=True)  # its journal is gone already: the tidying was cut short
    return report


def is_finished(plan: ConversionPlan, root: Path) -> bool:
    """Return whether `root` says that it holds the plan's output, complete; no file is read for that.

    Raises DestinationExistsError if it holds that of another plan.
    """
    return _finished_report(plan, root) is not None


def _finished_report(plan: ConversionPlan, root: Path) -> Mapping[str, Any] | None:
    if not all((root / name).is_file() for name in (CONFIG, MANIFEST, REPORT)) or (root / WORK / JOURNAL).exists():
        return None
    report = stored_report(root)
    if report.get("plan") != plan.digest:
        raise DestinationExistsError(
            f"output {quote(root)} holds a finished conversion with other settings, of another source or by another version: "
            "choose another folder, or overwrite it"
        )
    return report


def finished_report(plan: ConversionPlan, root: Path, stored: Mapping[str, Any], *, peak_memory: int) -> Report:
    """Return the report of an output that was complete before this run, from what it says of itself."""
    return Report(
        source=str(plan.checkpoint.origin),
        destination=str(root),
        scheme=plan.scheme,
        formats=dict(plan.formats),
        method=plan.method_text,
        kernel="none",
        device_reason="nothing to do",
        source_bytes=plan.checkpoint.tensor_bytes,
        output_bytes=plan.tensor_bytes,
        tensors=sum(shard.tensors for shard in plan.shards),
        quantized=sum(1 for _ in plan.weights()),
        kept=sum(not item.decision.quantize for item in plan.selection.tensors),
        relative_error=stored["relative_error"],
        patterns=tuple(PatternReport(**each) for each in stored["patterns"]),
        warnings=plan.warnings,
        resumed_shards=len(plan.shards),
        seconds=0.0,
        peak_memory=peak_memory,
        timings={},
        already_complete=True,
        left_out=plan.checkpoint.left_out,
        smoothed=plan.smoothing.weights if plan.smoothing is not None else 0,
    )
