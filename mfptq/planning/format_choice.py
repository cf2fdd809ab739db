"""Choose a format for every weight that is quantized: what the user asked for, else the base format.

Called by `building.build_plan` after `rules.select` has decided what is quantized. A fused layer has one format, and so have all
routed experts of a layer, since an engine asks for theirs once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from ..checkpoint.weights import Candidate, Weight
from ..errors import RuleError, UnsupportedTensorError, quote
from ..fp8 import TILE_SIDE
from ..names.engine import experts_parent
from ..names.fusion import FusedGroup
from ..names.patterns import match_names, unmatched_error
from .formats import FORMATS, KEEP, FormatRule, TargetFormat
from .rules import Decision, Rules, Selection, TensorDecision, select

WITHOUT_INPUTS = {
    "nvfp4": "nvfp4a16"
}  # what a format becomes where a layer's inputs cannot be quantized by a fixed scale
LATENT = "kv_b_proj"
LAST_MEMBER = "kv_a_proj_with_mqa"  # of its fused layer: nothing follows its last rows
LATENT_REASON = "engines multiply this matrix by an identity, which a fixed input scale would distort"


@dataclass(frozen=True, slots=True)
class _Matches:
    """For each name the first rule that matches it."""

    rules: Mapping[str, FormatRule]

    def of(self, item: Candidate) -> FormatRule | None:
        """Return the rule of a tensor: by its own name, its stack's parent, or its experts' names."""
        names = [item.module]
        if item.is_stack:
            names += [item.module.rpartition(".")[0], *(weight.module for weight in item.weights)]
        return next((self.rules[name] for name in names if name in self.rules), None)


class Source(NamedTuple):
    """What formats are chosen for: a source's tensors, and its config.json."""

    candidates: tuple[Candidate, ...]
    config: Mapping[str, Any]


def select_formats(source: Source, rules: Rules, wanted: Sequence[FormatRule], base: TargetFormat) -> Selection:
    """Return every tensor's decision, with a format where it is quantized.

    A rule whose pattern matches nothing but what a default keeps also quantizes that. Raises RuleError for patterns that
    match nothing or split what must have one format, UnsupportedTensorError for what a format cannot hold.
    """
    choose = partial(select, source.candidates, config=source.config)
    selection = choose(rules, activations=base.needs_input_scales)
    if not wanted:
        return _with_formats(selection, _Matches({}), base)
    matched = _match(source.candidates, wanted)
    targets = _unquantized(selection, {rule.pattern: matched[rule.pattern] for rule in wanted if rule.format != KEEP})
    if targets:
        latent = any(name.rpartition(".")[2] == LATENT for pattern in targets for name in matched[pattern])
        inputs = base.needs_input_scales and not latent  # which may then be quantized in another format
        selection = choose(replace(rules, targets=(*rules.targets, *targets)), activations=inputs)
    first: dict[str, FormatRule] = {}
    for rule in wanted:
        for name in matched[rule.pattern]:
            first.setdefault(name, rule)
    return _with_formats(selection, _Matches(first), base)


def _match(candidates: Sequence[Candidate], rules: Sequence[FormatRule]) -> dict[str, frozenset[str]]:
    names = dict.fromkeys(item.module for item in candidates)
    for item in candidates:
        if item.is_stack:
            names.update(dict.fromkeys((item.module.rpartition(".")[0], *(each.module for each in item.weights))))
    found = match_names(list(dict.fromkeys(rule.pattern for rule in rules)), list(names))
    for rule in rules:
        if not found[rule.pattern]:
            raise unmatched_error(rule.pattern, f"format {rule.format}", names)
    return found


def _unquantized(selection: Selection, matched: Mapping[str, Collection[str]]) -> list[str]:
    """Return the patterns that match nothing that is quantized."""
    quantized = {
        weight.module for item in selection.tensors if item.decision.quantize for weight in item.candidate.weights
    }
    quantized |= {item.candidate.module for item in selection.tensors if item.decision.quantize}
    parents = {name.rpartition(".")[0] for name in quantized}
    return [
        pattern for pattern, names in matched.items() if not any(name in quantized or name in parents for name in names)
    ]


def _with_formats(selection: Selection, matches: _Matches, base: TargetFormat) -> Selection:
    tensors = tuple(
        _given(item, matches, base) if item.decision.quantize else _kept(item, matches) for item in selection.tensors
    )
    found = {weight.module: item for item in tensors for weight in item.candidate.sample}
    samples = selection.sample_groups
    for name, members in undivided(samples):
        _check_one_format(name, [found[member] for member in members])
    for group in samples:
        _check_shapes(group, found)
    kept = {w.module for item in tensors if item.decision.format == KEEP for w in item.candidate.weights}
    groups = tuple([group for group in selection.groups if group.members[0] not in kept])
    if not groups:
        raise RuleError("nothing is left to quantize: every weight is kept in bfloat16 by a rule")
    return replace(selection, tensors=tensors, groups=groups)


def _kept(item: TensorDecision, matches: _Matches) -> TensorDecision:
    """Return what is kept anyway, with the format `bf16` where the user asked for that."""
    rule = matches.of(item.candidate)
    if rule is None or rule.format != KEEP:
        return item
    return TensorDecision(item.candidate, replace(item.decision, format=KEEP))


def _given(item: TensorDecision, matches: _Matches, base: TargetFormat) -> TensorDecision:
    """Return the decision with a format, and with the rule that chose it where the user did."""
    candidate, decision = item
    rule = matches.of(candidate)
    if rule is not None and rule.format == KEEP:
        return TensorDecision(candidate, Decision(False, rule.reason, rule.shown, KEEP))
    target = FORMATS[rule.format] if rule is not None else base
    latent = candidate.module.rpartition(".")[2] == LATENT
    if latent and target.needs_input_scales:
        if rule is not None or target.name not in WITHOUT_INPUTS:
            raise RuleError(
                f"{quote(candidate.module)} cannot be {target.name}: {LATENT_REASON}; use nvfp4a16 or fp8-dynamic"
            )
        return TensorDecision(candidate, replace(decision, format=WITHOUT_INPUTS[target.name], reason=LATENT_REASON))
    if rule is None:
        return TensorDecision(candidate, replace(decision, format=target.name))
    return TensorDecision(candidate, Decision(True, rule.reason, rule.shown, target.name))


def undivided(groups: Iterable[FusedGroup]) -> list[tuple[str, list[str]]]:
    """Return the sets of modules that share one format: fused layers, and the routed experts of a layer."""
    found = [(group.name, list(group.members)) for group in groups if len(group.members) > 1]
    experts: dict[str, list[str]] = {}
    for group in groups:
        parent = experts_parent(group.members[0])
        if parent is not None:
            experts.setdefault(parent, []).extend(group.members)
    return [*found, *experts.items()]


def _check_one_format(name: str, items: Sequence[TensorDecision]) -> None:
    first = items[0]
    other = next((item for item in items if item.decision.format != first.decision.format), None)
    if other is None:
        return
    asked = first if first.decision.reason.endswith("as asked") and first.decision.rule else other
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
