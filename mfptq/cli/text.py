"""Render text for people: tables and summaries.

Called by the commands, which print what comes back. Names of a source are shown so that control characters never reach the
terminal raw.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import counted, printable, quote
from ..kernels.choice import AS_GIVEN
from ..output.report import Report
from ..sizes import duration, size_text
from .columns import fitted
from .target_text import target_values

if TYPE_CHECKING:
    from pathlib import Path

    from ..execution.preview import Preview
    from ..inspection import Inspection, TensorSummary
    from ..planning.plan import ConversionPlan
    from ..verification import Verification

SHOWN_FAULTS = 20
SHOWN_FILES = 10
COMMON_RATE = 125e6  # bytes a second


def summary(report: Report, *, timings: bool, serve: bool = True) -> str:
    """Return what a conversion did, with the line that serves its output unless it is none that engines take."""
    if report.already_complete:
        made = f"{report.source}, {formats_text(report.formats)}"
        return f"{report.destination} is already complete: {made}, every file checked by SHA-256"
    weights = counted(report.quantized, "weight", "weights")
    error = f", relative error of weights {report.relative_error:.2%}" if report.method else ""
    why = "" if report.device_reason == AS_GIVEN else f" ({report.device_reason})"
    how = f"method {report.method}, kernel {report.kernel}{why}" if report.method else "nothing quantized anew"
    lines = [
        f"{report.source} -> {report.destination}",
        f"  {formats_text(report.formats)}, {how}: "
        f"{weights} {'quantized' if report.method else 'taken over'}, {counted(report.kept, 'tensor', 'tensors')} kept",
        f"  {size_text(report.source_bytes)} -> {size_text(report.output_bytes)} "
        f"({report.output_bytes / report.source_bytes:.1%}){error}",
        f"  {report.seconds:.1f} s ({size_text(int(report.source_bytes / max(report.seconds, 1e-9)))}/s), "
        f"peak memory {size_text(report.peak_memory)}",
    ]
    if report.smoothed:
        smoothed = counted(report.smoothed, "weight", "weights")
        lines.append(
            f"  inputs of {smoothed} smoothed, their factors are in the norms before: --no-smooth turns it off"
        )
    if report.resumed_shards:
        shards = counted(report.resumed_shards, "shard was", "shards were")
        lines.append(f"  {shards} finished by an earlier run, and checked by SHA-256")
    if report.fetched_bytes:
        lines.append(f"  {size_text(report.fetched_bytes)} fetched from the Hub")
    if report.unchecked_files:
        shards = counted(report.unchecked_files, "shard was", "shards were")
        lines.append(f"  {shards} not read whole and in order: lengths and ETags were checked, SHA-256 was not")
    lines += [f"  warning: {text}" for text in report.warnings]
    lines += [f"  {line}" for line in left_out_lines(report.left_out)]
    if timings:
        lines += [f"  {phase:>9} {seconds:8.2f} s of worker time" for phase, seconds in sorted(report.timings.items())]
    if report.published:
        lines.append(f"  published: {report.published}")
    command = f"\n  vllm serve {shlex.quote(report.destination)}" if serve else ""  # in one line, to be copied
    return fitted("\n".join(lines)) + command


def after_demo(folder: Path) -> str:
    """Return what to try next: on the demo's small models, then on one of the user's own."""
    dense = shlex.quote(str(folder / "dense"))
    commands = {
        "Look closer at the small model:": (
            f"plan {dense}", f"check {dense}-NVFP4", f"report {dense}-NVFP4",
        ),
        "Next, with a model of your own:": ("plan Qwen/Qwen3.5-27B", "convert Qwen/Qwen3.5-27B Qwen3.5-27B-NVFP4"),
    }  # fmt: skip
    return "\n".join(f"{title}\n" + "\n".join(f"  mfptq {each}" for each in rows) for title, rows in commands.items())


def preview_lines(view: Preview) -> Iterator[str]:
    """Yield what a run would find: how much comes from the Hub, and the state of the output folder."""
    if view.fetch_bytes:
        again = (
            f", {size_text(view.refetch_bytes)} of it a second time for want of memory" if view.refetch_bytes else ""
        )
        yield f"{size_text(view.fetch_bytes)} to fetch from the Hub{again}{_fetching_text(view)}"
    if view.output is None:
        return
    name = printable(view.output.path)
    if view.output.complete:
        yield f"{name} is complete already: a run would compare every file with its digest, and write nothing"
        return
    resumed = view.output.finished_shards
    there = f", {counted(resumed, 'shard', 'shards')} of an earlier run kept" if resumed else ""
    yield f"{name}: {size_text(view.output.needed_bytes)} needed, {size_text(view.output.free_bytes)} free{there}"


def _fetching_text(view: Preview) -> str:
    """Return how long fetching takes at the rate that was measured; at a common one where only computing was."""
    if view.fetch_rate:
        return f", about {duration(view.fetch_bytes / view.fetch_rate)} at the {size_text(int(view.fetch_rate))}/s measured now"
    if view.computing_seconds is None:
        return ""
    return f", about {duration(view.fetch_bytes / COMMON_RATE)} at 1 Gbit/s"


def plan_values(plan: ConversionPlan, view: Preview) -> dict[str, Any]:
    """Return a plan, and what its run would use, as JSON values."""
    from ..inspection import plan_patterns

    patterns = plan_patterns(plan)
    elements = sum(row.elements for row in patterns)
    return {
        "source": str(plan.checkpoint.origin),
        "scheme": plan.scheme,
        "formats": dict(plan.formats.most_common()),
        "kv_cache": plan.settings.kv_cache,
        "kv_cache_scales": plan.cache_scales.layers,
        "method": plan.method,
        "methods": dict(plan.methods.most_common()),
        "smoothing": plan.smoothing.as_dict() if plan.smoothing is not None else None,
        "shards": len(plan.shards),
        "source_bytes": plan.checkpoint.tensor_bytes,
        "output_bytes": plan.tensor_bytes,
        "output_tensors": sum(shard.tensors for shard in plan.shards),
        "bits_per_weight": plan.tensor_bytes * 8 / elements,
        **view.values(),
        "warnings": list(plan.warnings),
        "notes": list(plan.contents.notes),
        "share": str(plan.share),
        **({} if plan.allocation is None else {"target": target_values(plan.allocation)}),
        "left_out": dict(plan.checkpoint.left_out),
        "disk_bytes": plan.output_bytes,
        "patterns": [{**asdict(row), "bits": row.bits} for row in patterns],
    }


def left_out_lines(left_out: Mapping[str, int]) -> list[str]:
    """Return a line for each file that is not taken over, the largest first, and a last one for the rest."""
    largest = sorted(left_out.items(), key=lambda item: -item[1])
    lines = [f"left out: {printable(name)} ({size_text(size)})" for name, size in largest[:SHOWN_FILES]]
    rest = largest[SHOWN_FILES:]
    return lines + (
        [f"left out: {counted(len(rest), 'other file', 'other files')} ({size_text(sum(size for _, size in rest))})"]
        if rest
        else []
    )


def formats_text(formats: Mapping[str, int]) -> str:
    """Return the formats in use, with how many weights each has where there are several."""
    if len(formats) == 1:
        return next(iter(formats)).upper()
    return ", ".join(f"{name} ({count})" for name, count in formats.items())


def inspection_text(found: Inspection) -> str:
    """Return what a checkpoint holds as a table."""
    config = found.quantization or {}
    state = quote(config.get("format") or config.get("quant_method") or "quantized") if config else "not quantized"
    tensors, shards = counted(found.tensors, "tensor", "tensors"), counted(found.shards, "shard", "shards")
    title = f"{found.origin}: {tensors} in {shards}, {size_text(found.tensor_bytes)}, {state}"
    return "\n".join([title, *(f"  {note}" for note in found.notes), *(_stored_row(row) for row in found.patterns)])


def _stored_row(row: TensorSummary) -> str:
    return f"{row.count:7} {row.dtype:>8} {size_text(row.source_bytes):>10}  {printable(row.pattern)}"


def verification_text(found: Verification) -> str:
    """Return what was checked, and the faults."""
    lines = [
        f"checked {found.tensors} tensors, {found.quantized} quantized modules, and {found.digests} files by SHA-256"
    ]
    if not found.digests:
        lines.append("  no SHA256SUMS here: files were not compared with what the conversion wrote")
    if found.scaled:
        lines.append(
            f"  {counted(found.scaled, 'kept tensor is', 'kept tensors are')} the source's times the factors of smoothing"
        )
    if found.checksums:
        lines.append(f"  {found.checksums} layers of the source compared with the values that were converted")
    elif found.errors:
        lines.append("  no checksums in the report: whether the source has changed since was not checked")
    if found.errors:
        lines.append("  relative error of weights:")
    lines += [f"  {error:7.2%}  {printable(pattern)}" for pattern, error in found.errors.items()]
    lines += [f"  {line}" for line in left_out_lines(found.left_out)]
    lines += [f"  fault: {fault}" for fault in found.faults[:SHOWN_FAULTS]]
    if len(found.faults) > SHOWN_FAULTS:
        lines.append(f"  ... and {len(found.faults) - SHOWN_FAULTS} more")
    return "\n".join([*lines, "verified: no fault" if found.ok else counted(len(found.faults), "fault", "faults")])
