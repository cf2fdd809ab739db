"""Choose a format for every weight that is quantized: what the user asked for, else the base format.

Called by `building`; `rules` decides what is quantized. A fused layer has one format, and so have all routed experts of a
layer, since an engine asks for theirs once: what would split one is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..checkpoint.weights import Candidate, Weight
from ..errors import RuleError, UnsupportedTensorError, quote
from ..fp8 import TILE_SIDE
from ..names.fusion import FusedGroup, undivided
from .formats import FORMATS, KEEP, FormatRule, TargetFormat
from .rules import Decision, Selection, TensorDecision, match_modules, pattern_names, select

if TYPE_CHECKING:
    from .settings import Settings

# What a format becomes where a layer's inputs cannot be quantized by a fixed scale.
WITHOUT_INPUTS = {"nvfp4": "nvfp4a16"}
LATENT = "kv_b_proj"
LAST_MEMBER = "kv_a_proj_with_mqa"  # of its fused layer: nothing follows its last rows
LATENT_REASON = "engines multiply this matrix by an identity, which a fixed input scale would distort"


def select_formats(
    candidates: Sequence[Candidate], config: Mapping[str, Any], settings: Settings, base: TargetFormat
) -> Selection:
    """Return every tensor's decision, with a format where it is quantized: `base`, unless a rule of the settings gives another.

    `config` is the source's config.json. A rule whose pattern matches nothing but what a default keeps also quantizes that.
    Raises RuleError for patterns that match nothing or split what must have one format, UnsupportedTensorError for what a
    format cannot hold.
    """
    rules, wanted = settings.rules, settings.all_formats
    choose = partial(select, candidates, config=config)
    selection = choose(rules, activations=base.needs_input_scales)
    matched = match_modules(candidates, [(rule.pattern, f"format {rule.format}") for rule in wanted])
    targets = _unquantized(selection, {rule.pattern: matched[rule.pattern] for rule in wanted if rule.format != KEEP})
    if targets:
        latent = any(name.rpartition(".")[2] == LATENT for pattern in targets for name in matched[pattern])
        inputs = base.needs_input_scales and not latent  # which may then be quantized in another format
        selection = choose(replace(rules, targets=(*rules.targets, *targets)), activations=inputs)
    first: dict[str, FormatRule] = {}
    for rule in wanted:
        for name in matched[rule.pattern]:
            first.setdefault(name, rule)
    return _with_formats(selection, first, base)


def _unquantized(selection: Selection, matched: Mapping[str, Collection[str]]) -> list[str]:
    """Return the patterns that match nothing that is quantized."""
    if not matched:
        return []
    quantized = [item.candidate for item in selection.tensors if item.decision.quantize]
    names = {name for item in quantized for name in (item.module, *(weight.module for weight in item.weights))}
    names |= {name.rpartition(".")[0] for name in names}
    return [pattern for pattern, found in matched.items() if names.isdisjoint(found)]


def _with_formats(selection: Selection, rules: Mapping[str, FormatRule], base: TargetFormat) -> Selection:
    """Return the decisions with formats; `rules` has the rule of each name that one matches."""
    tensors = tuple(_with_format(item, rules, base) for item in selection.tensors)
    found = {weight.module: item for item in tensors for weight in item.candidate.sample}
    samples = selection.sample_groups
    for name, members in undivided((member for group in samples for member in group.members), samples):
        _check_one_format(name, [found[member] for member in members])
    for group in samples:
        _check_shapes(group, found)
    kept = {w.module for item in tensors if item.decision.format == KEEP for w in item.candidate.weights}
    groups = tuple([group for group in selection.groups if group.members[0] not in kept])
    if not groups:
        raise RuleError("nothing is left to quantize: every weight is kept in bfloat16 by a rule")
    return replace(selection, tensors=tensors, groups=groups)


def _with_format(item: TensorDecision, rules: Mapping[str, FormatRule], base: TargetFormat) -> TensorDecision:
    """Return the decision with a format, and with the rule that chose it where the user did."""
    candidate, decision = item
    rule = next((rules[name] for name in pattern_names(candidate) if name in rules), None) if rules else None
    if rule is not None and rule.format == KEEP:
        chosen = Decision(False, rule.reason, rule.shown) if decision.quantize else decision
        return TensorDecision(candidate, replace(chosen, format=KEEP))
    if not decision.quantize:
        return item
    target = FORMATS[rule.format] if rule is not None else base
    if candidate.module.rpartition(".")[2] == LATENT and target.needs_input_scales:
        if rule is not None or target.name not in WITHOUT_INPUTS:
            raise RuleError(
                f"{quote(candidate.module)} cannot be {target.name}: {LATENT_REASON}; use nvfp4a16 or fp8-dynamic"
            )
        return TensorDecision(candidate, replace(decision, format=WITHOUT_INPUTS[target.name], reason=LATENT_REASON))
    if rule is None:
        return TensorDecision(candidate, replace(decision, format=target.name))
    return TensorDecision(candidate, Decision(True, rule.reason, rule.shown, target.name))


def _check_one_format(name: str, items: Sequence[TensorDecision]) -> None:
    first = items[0]
    other = next((item for item in items if item.decision.format != first.decision.format), None)
    if other is None:
        return
    asked = first if first.decision.is_users and first.decision.rule else other
    raise RuleError(
        f"pattern {quote(asked.decision.rule)} splits {quote(name)}, which engines load in one format: "
        f"{quote(first.candidate.module)} would be {first.decision.format}, "
        f"{quote(other.candidate.module)} {other.decision.format}"
    )


def is_cut(weight: Weight, group: FusedGroup, target: TargetFormat) -> bool:
    """Return whether a member of a fused layer ends inside a block of rows that the layer's next member would share."""
    shared = target.segment[0] > 1 and len(group.members) > 1
    return shared and weight.rows % TILE_SIDE != 0 and not weight.module.endswith(LAST_MEMBER)


def _check_shapes(group: FusedGroup, found: Mapping[str, TensorDecision]) -> None:
    """Refuse a fused layer whose members' blocks of rows would not lie where the layer's do."""
    target = FORMATS.get(found[group.members[0]].decision.format)
    if target is None:
        return
    for member in group.members:
        weight = next(each for each in found[member].candidate.weights if each.module == member)
        if is_cut(weight, group, target):
            raise UnsupportedTensorError(
                f"{quote(member)} cannot be {target.name}: it is fused into {quote(group.name)}, and its {weight.rows} rows "
                f"are not a multiple of {TILE_SIDE}: use fp8-dynamic"
            )
