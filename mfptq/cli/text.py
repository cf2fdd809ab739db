"""Text for people: progress bars, tables and summaries."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..execution.events import Advanced, Event, OnEvent, Planned
from ..execution.memory_budget import parse_size, plan_memory
from ..output.report import Report
from ..planning.plan import Plan
from ..storage.digest import available_cores

if TYPE_CHECKING:
    from ..inspection import Inspection, TensorKind
    from ..verification import Verification

HELD_BYTES = 40 * 2**20  # by the interpreter, with numpy and kernels that are compiled already
SHOWN_FAULTS = 20


def printable(name: str) -> str:
    """Return a name of the source as it may be shown: control characters never reach the terminal raw."""
    return name if name.isprintable() else ascii(name)


def size_text(size: int) -> str:
    """Return bytes in decimal units."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"


@contextmanager
def progress(*, quiet: bool) -> Iterator[OnEvent]:
    """Lend a callback that moves a bar in source bytes; off a terminal it shows nothing."""
    if quiet or sys.stderr is None or not sys.stderr.isatty() or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        yield lambda _event: None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc="convert", leave=False) as bar:

        def show(event: Event) -> None:
            if isinstance(event, Planned):
                bar.total = event.total_bytes
            elif isinstance(event, Advanced):
                bar.update(event.source_bytes)

        yield show


def summary(report: Report, *, timings: bool) -> str:
    """Return what a conversion did, with the line that serves its output."""
    lines = [
        f"{report.source} -> {report.destination}",
        f"  {report.scheme}, method {report.method}, kernel {report.kernel} ({report.device_reason}): {report.quantized} weights quantized, "
        f"{report.kept} tensors kept",
        f"  {size_text(report.source_bytes)} -> {size_text(report.output_bytes)} "
        f"({report.output_bytes / report.source_bytes:.1%}), relative error {report.relative_error:.2%}",
        f"  {report.seconds:.1f} s ({size_text(int(report.source_bytes / max(report.seconds, 1e-9)))}/s), "
        f"peak memory {size_text(report.peak_memory)}",
    ]
    if report.resumed_shards:
        lines.append(f"  {report.resumed_shards} shards were finished by an earlier run and checked by content")
    lines += [f"  warning: {text}" for text in report.warnings]
    if timings:
        lines += [f"  {phase:>9} {seconds:8.2f} s of worker time" for phase, seconds in sorted(report.timings.items())]
    return "\n".join([*lines, f"  vllm serve {shlex.quote(report.destination)}"])


def plan_values(plan: Plan, max_memory: str, workers: int | None) -> dict[str, Any]:
    """Return a plan as JSON values."""
    threads = workers or available_cores()
    memory = plan_memory(parse_size(max_memory), HELD_BYTES, threads, statistics=plan.statistics_bytes)
    from ..inspection import plan_kinds

    kinds = plan_kinds(plan)
    elements = sum(kind.elements for kind in kinds)
    return {
        "source": str(plan.checkpoint.origin),
        "scheme": plan.scheme,
        "method": plan.method,
        "methods": dict(plan.methods.most_common()),
        "shards": len(plan.shards),
        "source_bytes": plan.checkpoint.tensor_bytes,
        "output_bytes": plan.tensor_bytes,
        "output_tensors": sum(shard.tensors for shard in plan.shards),
        "bits_per_weight": plan.tensor_bytes * 8 / elements,
        "peak_memory": memory.peak,
        "warnings": list(plan.warnings),
        "left_out": list(plan.checkpoint.left_out),
        "kinds": [{**asdict(kind), "bits": kind.bits} for kind in kinds],
    }


def plan_text(values: Mapping[str, Any]) -> str:
    """Return a plan as a table and a few sums."""
    rows = [f"{'':7} {'count':>7} {'source':>10} {'output':>10} {'bits':>6}  kind: reason"]
    rows += [
        f"{kind['action']:7} {kind['count']:7} {size_text(kind['source_bytes']):>10} "
        f"{size_text(kind['output_bytes']):>10} {kind['bits']:6.2f}  {printable(kind['kind'])}: {kind['reason']}"
        + (f"; {kind['method']}" if kind["method"] else "")
        for kind in values["kinds"]
    ]
    ratio = values["output_bytes"] / max(values["source_bytes"], 1)
    return "\n".join([
        *rows,
        "",
        f"{values['source']}: {values['scheme']}, method {_methods_text(values)}, {values['shards']} shards, "
        f"{values['output_tensors']} output tensors",
        f"{size_text(values['source_bytes'])} -> {size_text(values['output_bytes'])} ({ratio:.1%}), "
        f"{values['bits_per_weight']:.2f} bits per weight, peak memory about {size_text(values['peak_memory'])}",
        *(f"warning: {text}" for text in values["warnings"]),
    ])  # fmt: skip


def _methods_text(values: Mapping[str, Any]) -> str:
    """Return the method, with what it comes to where it is not one for all weights."""
    counts: Mapping[str, int] = values["methods"]
    if list(counts) == [values["method"]]:
        return str(values["method"])
    return f"{values['method']} ({', '.join(f'{name} {count}' for name, count in counts.items())})"


def inspection_text(found: Inspection) -> str:
    """Return what a checkpoint holds as a table."""
    config = found.quantization or {}
    state = str(config.get("format") or config.get("quant_method") or "quantized") if config else "not quantized"
    rows = [
        f"{found.origin}: {found.tensors} tensors in {found.shards} shards, {size_text(found.tensor_bytes)}, {state!a}"
    ]
    return "\n".join([*rows, *(_kind_row(kind) for kind in found.kinds)])


def _kind_row(kind: TensorKind) -> str:
    return f"{kind.count:7} {kind.dtype:>8} {size_text(kind.source_bytes):>10}  {printable(kind.kind)}"


def verification_text(found: Verification) -> str:
    """Return what was checked, and the faults."""
    lines = [f"checked {found.tensors} tensors, {found.quantized} quantized modules, {found.digests} digests"]
    lines += [f"  {error:7.2%}  {printable(kind)}" for kind, error in found.errors.items()]
    lines += [f"  fault: {fault}" for fault in found.faults[:SHOWN_FAULTS]]
    if len(found.faults) > SHOWN_FAULTS:
        lines.append(f"  ... and {len(found.faults) - SHOWN_FAULTS} more")
    return "\n".join([*lines, "verified: no fault" if found.ok else f"{len(found.faults)} faults"])
