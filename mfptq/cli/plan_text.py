"""Render a plan for people: groups, large ones first, in as many columns as the terminal has.

Called by `plan` and `convert --dry-run`, which print what comes back. Programs take `plan --json` instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ..checkpoint.weights import name_pattern
from ..engines.findings import Finding
from ..errors import counted, printable
from ..inspection import TensorSummary, planned_summary
from ..sizes import duration, size_text
from .check import findings_lines
from .columns import wrapped
from .target_text import target_lines
from .text import formats_text, left_out_lines, preview_lines

if TYPE_CHECKING:
    from ..execution.preview import Preview
    from ..planning.plan import ConversionPlan

FP4, KEPT = "FP4", "kept"
SMALL_BYTES = 2**20  # kept tensors of a pattern share a line with others where they take less than this,
SMALL_SHARE = 0.02  # and less than this part of all that is kept


@dataclass(slots=True)
class Group:
    """Tensors with one pattern and one reason to be quantized or kept; `layers` are the numbers in the place of the first `*`."""

    pattern: str
    why: str
    count: int = 0
    source_bytes: int = 0
    output_bytes: int = 0
    layers: set[int] = field(default_factory=set)

    def add(self, name: str, planned: TensorSummary) -> None:
        """Take in one tensor."""
        self.count += 1
        self.source_bytes += planned.source_bytes
        self.output_bytes += planned.output_bytes
        number = next((part for part in name.split(".") if part.isdigit()), None)
        if number is not None:
            self.layers.add(int(number))


Groups: TypeAlias = dict[str, dict[tuple[str, str], Group]]  # by section, then by pattern and reason


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as people write them: `0-5,8`; runs at even steps are cut short: `3,7,...,63`, `0-2,4-6,...,60-62`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    written = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    even = len({len(run) for run in runs}) == 1 and len({after[0] - before[0] for before, after in pairwise(runs)}) == 1
    return ",".join([*written[:2], "...", written[-1]] if even and len(runs) > 3 else written)


def plan_text(
    plan: ConversionPlan,
    view: Preview,
    findings: Sequence[Finding],
    *,
    columns: int,
    every: bool = False,
) -> str:
    """Return a plan as text of at most that many columns; `every` lists each tensor."""
    groups = _groups(plan, every=every)
    prefix = _common(groups[FP4].values())
    lines = [*wrapped(_title(plan), columns), *wrapped(str(plan.share), columns)]
    for text in _smoothing_lines(plan):
        lines += wrapped(text, columns)
    for note in plan.contents.notes:
        lines += wrapped(f"source: {note}", columns)
    if prefix:
        lines += wrapped(f"names below are without the prefix {prefix}", columns)
    for section in (FP4, KEPT):
        rows = sorted(groups[section].values(), key=lambda group: (-group.source_bytes, group.pattern))
        reasons = Counter(row.why for row in rows)
        usual = reasons.most_common(1)[0][0] if section == FP4 and reasons else ""
        style = TableStyle(columns, prefix, usual, plan.share.into)
        lines += ["", *_table(section, rows, style, every=every)]
    for left_out in left_out_lines(plan.checkpoint.left_out):
        lines += wrapped(left_out, columns)
    lines += ["", *(line for text in _sums(plan, view, groups) for line in wrapped(text, columns))]
    if plan.allocation is not None:
        lines += ["", *target_lines(plan.allocation, columns)]
    if plan.settings.kv_cache is not None:
        lines += wrapped(plan.cache_scales.text, columns)
    for warning in plan.warnings:
        lines += wrapped(f"warning: {warning}", columns)
    if findings:
        lines += ["", "what engines would find:", *findings_lines(findings, columns)]
    return "\n".join(lines)


def _smoothing_lines(plan: ConversionPlan) -> Iterator[str]:
    """Yield what is smoothed and what is not, and how that came about."""
    if plan.smoothing is None:
        return
    first, *rest = plan.smoothing.lines
    by_default = plan.smoothing.weights and plan.settings.smooth is None
    yield first + (" (by default for W4A4; --no-smooth turns it off)" if by_default else "")
    yield from rest


def _title(plan: ConversionPlan) -> str:
    what = "W4A4" if plan.scheme == "NVFP4" else "W4A16"
    counts = ", ".join(f"{name} {count}" for name, count in plan.methods.most_common())
    method = f"method {plan.method}" if plan.methods else "nothing quantized anew"
    if counts and list(plan.methods) != [plan.method]:
        method += f" ({counts})"
    scheme = (
        f"{plan.scheme} ({what})"
        if plan.formats.keys() == {plan.scheme.lower()}
        else formats_text(dict(plan.formats.most_common()))
    )
    return f"{plan.checkpoint.origin}: {scheme}, {method}"


def _groups(plan: ConversionPlan, *, every: bool) -> Groups:
    groups: Groups = {FP4: {}, KEPT: {}}
    several, mixed = len(plan.formats) > 1, len(plan.methods) > 1
    for item in plan.selection.tensors:
        name, planned = item.candidate.tensor.info.name, planned_summary(item, plan)
        why = f"{planned.reason} ({planned.rule})" if planned.rule else planned.reason
        if item.decision.quantize and several:
            why = f"{planned.action}; {why}"
        if planned.method and mixed:
            why += f"; {planned.method}"
        pattern = name if every else name_pattern(name)
        section = FP4 if item.decision.quantize else KEPT
        group = groups[section].setdefault((pattern, why), Group(pattern, why))
        group.add(name, planned)
    return groups


class TableStyle(NamedTuple):
    """How a table is written: its width, the prefix of names and the usual reason, which rows leave out, and the new formats."""

    columns: int
    prefix: str
    usual: str
    into: str


def _common(rows: Iterable[Group]) -> str:
    """Return the beginning, up to a dot, that the names of most bytes share: `model.language_model.`."""
    sizes: Counter[str] = Counter()
    for row in rows:
        before, found, _ = row.pattern.partition("layers.")
        sizes[before if found else ""] += row.source_bytes
    return sizes.most_common(1)[0][0] if sizes else ""


def _table(section: str, rows: list[Group], style: TableStyle, *, every: bool) -> Iterator[str]:
    before, after = sum(row.source_bytes for row in rows), sum(row.output_bytes for row in rows)
    count = sum(row.count for row in rows)
    sizes = f"{size_text(before)} -> {size_text(after)}" if section == FP4 else size_text(before)
    usual = f": {printable(style.usual)}" if style.usual else ""
    title = style.into if section == FP4 else section
    yield from wrapped(f"{title}: {counted(count, 'tensor', 'tensors')}, {sizes}{usual}", style.columns)
    least = min(SMALL_BYTES, SMALL_SHARE * before)
    listed = [row for row in rows if every or section == FP4 or row.source_bytes >= least]
    for row in listed:
        yield from _row(row, section, style)
    small = [row for row in rows if row not in listed]
    if small:
        tensors = counted(sum(row.count for row in small), "small tensor", "small tensors")
        size = size_text(sum(row.source_bytes for row in small))
        reasons = "; ".join(dict.fromkeys(row.why for row in small))
        yield from wrapped(
            f"  {size:>8}  {tensors} (norms, biases and the like): {printable(reasons)}", style.columns, " " * 12
        )


def _row(row: Group, section: str, style: TableStyle) -> list[str]:
    """Return a group's lines: sizes, its name with the layers' numbers, and the reason where it is not the usual one."""
    sizes = f"{size_text(row.source_bytes):>8}"
    if section == FP4:
        sizes += f" -> {size_text(row.output_bytes):>8}"
    name = row.pattern.removesuffix(".weight").removeprefix(style.prefix)
    if row.layers:
        name = name.replace("*", ranges(row.layers), 1)
    why = "" if row.why == style.usual else f": {printable(row.why)}"
    text = f"  {sizes}  {printable(name)}{why}"
    return wrapped(text, style.columns, " " * 12)


def _sums(plan: ConversionPlan, view: Preview, groups: Groups) -> Iterator[str]:
    runs = (run for item in plan.selection.tensors for run in plan.runs_of(item))
    checkpoint, elements = plan.checkpoint, sum(weight.size for run in runs for weight in run.weights)
    packed = sum(group.output_bytes for group in groups[FP4].values())
    ratio = plan.tensor_bytes / max(checkpoint.tensor_bytes, 1)
    yield (
        f"{size_text(checkpoint.tensor_bytes)} -> {size_text(plan.tensor_bytes)} ({ratio:.0%}), "
        f"{packed * 8 / elements if elements else 0:.2f} bits per {plan.share.into} weight"
    )
    yield f"{counted(len(plan.shards), 'file', 'files')}, {size_text(plan.output_bytes)} of disk, peak memory about {size_text(view.peak_memory)}"
    yield from preview_lines(view)
    read = _decode_bytes(plan, groups)
    if read:
        yield f"a decode step reads about {size_text(read)} of weights"
    if view.computing_seconds is not None:
        yield f"about {duration(view.computing_seconds)} of computing here; a slow disk or network takes longer"


def _decode_bytes(plan: ConversionPlan, groups: Groups) -> int:
    """Return how many bytes of weights one token reads: of routed experts only those that a token is sent to."""
    inner = plan.checkpoint.config.get("text_config")
    config = inner if isinstance(inner, dict) else plan.checkpoint.config
    experts = next(
        (config[key] for key in ("num_experts", "n_routed_experts", "num_local_experts") if key in config), 0
    )
    taken = config.get("num_experts_per_tok", 0)
    share = taken / experts if type(experts) is int and type(taken) is int and experts > 0 else 1.0
    total = 0.0
    for group in chain.from_iterable(rows.values() for rows in groups.values()):
        if not any(part in group.pattern for part in ("embed", "visual", "vision", "audio", "mtp")):
            total += group.output_bytes * (share if ".experts" in group.pattern else 1.0)
    return int(total)
