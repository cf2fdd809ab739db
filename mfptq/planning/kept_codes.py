"""Let weights that are kept stay FP8, bit for bit, where the source stores them so and engines load that.

Called by `building`, once everything else is decided. Such a weight gets the format of the table that takes its codes as they
are, and so a config group, as if a rule had asked for it. All other kept weights that are stored as codes are widened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint.weights import Candidate, Weight
from ..encodings.scaled import ScaledCodes
from ..names.fusion import fused_groups, undivided
from ..names.leaves import LINEAR_LEAVES, leaf_of
from ..names.structure import DRAFTER
from ..names.wrappers import logical
from ..nvfp4 import BLOCK_SIZE
from .defaults import Defaults, siblings_of
from .format_choice import is_cut
from .formats import FORMATS, KEEP, TargetFormat
from .rules import Decision, Selection, TensorDecision
from .stored_codes import takes_codes

REASON = "FP8 already, goes over as it is"
_HEAD, _LINEAR = "head", ("", "drafter")  # roles of layers that engines build quantized


def with_kept_codes(selection: Selection) -> Selection:
    """Return the decisions with a format for each kept weight whose codes stay as they are."""
    stored = [item for item in selection.tensors if _is_stored(item)]
    if not stored:
        return selection
    siblings = siblings_of(item.candidate.tensor.info.name for item in selection.tensors)
    defaults = Defaults(selection.structure, siblings, activations=False)
    found = ((item, _format(item, defaults)) for item in stored)
    chosen = {weight.module: target for item, target in found if target for weight in item.candidate.weights}
    chosen = _whole(selection, chosen) if chosen else chosen
    if not chosen:
        return selection
    result = replace(selection, tensors=tuple(_carried(item, chosen) for item in selection.tensors))
    return replace(result, groups=tuple(fused_groups(weight.module for _, weight in result.quantized())))


def _is_stored(item: TensorDecision) -> bool:
    """Return whether a tensor is kept, not in bfloat16 as asked, and holds weights in codes."""
    kept = not item.decision.quantize and item.decision.format != KEEP
    return kept and bool(item.candidate.weights) and isinstance(item.candidate.tensor.encoding, ScaledCodes)


def _format(item: TensorDecision, defaults: Defaults) -> TargetFormat | None:
    """Return the format that a kept tensor's codes have already; None where there is none, or engines would not read it."""
    candidate = item.candidate
    role = _role(candidate, defaults)
    if role is None or candidate.weights[0].columns % BLOCK_SIZE:
        return None
    fitting = [each for each in FORMATS.values() if all(takes_codes(each, weight) for weight in candidate.weights)]
    if role == _HEAD:  # SGLang reads no blocks there
        fitting = [each for each in fitting if each.segment[0] == 1]
    own = _block(candidate.weights[0])
    return min((each for each in fitting if each.family == "fp8"), key=lambda each: each.segment != own, default=None)


def _role(candidate: Candidate, defaults: Defaults) -> str | None:
    """Return the role of a layer that engines build quantized if its config group says so, else None."""
    line = defaults.line(candidate)
    role = line.role if line is not None else ""
    if role == _HEAD:
        return None if defaults.structure.sizes.is_tied else role
    inside = defaults.structure.outside(candidate.module) in ("", DRAFTER)
    if defaults.structure.is_renumbered(candidate.module):
        return None  # patterns would have to name it otherwise than its tensors
    known = candidate.is_stack or leaf_of(logical(candidate.module)) in LINEAR_LEAVES
    return role if role in _LINEAR and inside and known else None


def _block(weight: Weight) -> tuple[int, int]:
    assert isinstance(weight.encoding, ScaledCodes)
    return weight.encoding.block_rows, weight.encoding.block_columns


def _whole(selection: Selection, chosen: Mapping[str, TargetFormat]) -> dict[str, TargetFormat]:
    """Return the choices without those that would give parts of one fused layer, or experts of one layer, two formats."""
    weights = {weight.module: weight for item in selection.tensors for weight in item.candidate.weights}
    groups = fused_groups(weights)
    sets = [members for _, members in undivided(weights, groups)]
    sets += [tuple(w.module for w in item.candidate.weights) for item in selection.tensors if item.candidate.is_stack]
    quantized = {weight.module: FORMATS[item.decision.format] for item, weight in selection.quantized()}
    own = ((name, group) for group in groups for name in group.members if name in chosen)
    left = {name: chosen[name] for name, group in own if not is_cut(weights[name], group, chosen[name])}
    while True:
        formats = quantized | left
        mixed = {name for members in sets if len({formats.get(each) for each in members}) > 1 for name in members}
        if mixed.isdisjoint(left):
            return left
        left = {name: target for name, target in left.items() if name not in mixed}


def _carried(item: TensorDecision, chosen: Mapping[str, TargetFormat]) -> TensorDecision:
    weights, decision = item.candidate.weights, item.decision
    if decision.quantize or not weights or weights[0].module not in chosen:
        return item
    reason = f"{REASON}: {decision.reason}"
    return TensorDecision(item.candidate, Decision(True, reason, decision.rule, chosen[weights[0].module].name))
