"""Say why one tensor is quantized or kept: rule, layout, method, partners, and what engines would find.

Called by `convert` for `plan --explain`, which prints what comes back.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..checkpoint.weights import name_pattern
from ..engines.findings import Finding
from ..errors import UsageError, printable, quote
from ..sizes import size_text
from .check import findings_lines
from .columns import wrapped
from .target_text import explained_lines

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan
    from ..planning.rules import TensorDecision


def explain_text(plan: ConversionPlan, name: str, findings: Sequence[Finding], columns: int) -> str:
    """Return why one tensor is quantized or kept, or raise UsageError with the nearest names."""
    items = {item.candidate.tensor.info.name: item for item in plan.selection.tensors}
    item = items.get(name) or items.get(f"{name}.weight")
    if item is None:
        alike = difflib.get_close_matches(name, items, n=3) or [each for each in items if name in each][:3]
        near = ", ".join(map(quote, alike))
        raise UsageError(f"{quote(name)} is no tensor of this checkpoint" + (f"; near names: {near}" if near else ""))
    own = [each for each in findings if name_pattern(item.candidate.module) in each.patterns]
    told = [line for text in _explained(plan, item) for line in wrapped(text, columns, "    ")]
    if plan.allocation is not None:
        told += explained_lines(plan.allocation, item.candidate.module, columns)
    return "\n".join([*told, *findings_lines(own, columns)])


def _label(plan: ConversionPlan, item: TensorDecision) -> str:
    """Return what a tensor becomes: FP4, or the exact format where there are others."""
    return "FP4" if plan.share.into == "FP4" else plan.format_of(item.candidate.weights[0]).name


def _explained(plan: ConversionPlan, item: TensorDecision) -> Iterator[str]:
    info, decision, weights = item.candidate.tensor.info, item.decision, item.candidate.weights
    yield f"{printable(info.name)}: {info.dtype} {list(info.shape)}, {size_text(info.nbytes)}"
    yield f"  {f'becomes {_label(plan, item)}' if decision.quantize else 'kept as it is'}: {printable(plan.reason(item))}"
    yield f"  rule: {printable(decision.rule) if decision.rule else 'none, no pattern matches its name'}"
    if item.candidate.obstacle:
        yield f"  layout: {item.candidate.obstacle}"
    if decision.quantize:
        partners = [name for name in plan.group_of(weights[0]).members if name != weights[0].module]
        yield f"  method: {plan.method_of(weights[0])}"
        if plan.format_of(weights[0]).by_group:
            yield f"  shares one global scale with: {', '.join(map(printable, partners)) or 'no other weight'}"
        if len(weights) > 1:
            yield f"  split into {len(weights)} weights, the first is {printable(weights[0].module)}"
