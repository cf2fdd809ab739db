"""Which weights become FP4: names and shapes decide, since no module types are known.

Order: what `--ignore` names is kept; what `--target` names is quantized; then the defaults below keep what engines or
quality need in full precision; every other matrix that the format can hold is quantized.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.weights import Candidate, name_pattern
from ..errors import RuleError, UnsupportedTensorError, quote
from ..names.fusion import FusedGroup, experts_parent, fused_groups
from ..names.patterns import REGEX_PREFIX, match_names, unmatched_error
from ..nvfp4 import BLOCK_SIZE

if TYPE_CHECKING:
    from ..scales.sibling import SiblingLayers

SOURCE_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class DefaultRule:
    """A pattern whose modules stay as they are, and why."""

    pattern: str
    reason: str


# The first ten are the `ignore` list that Qwen3.5 checkpoints need in vLLM and SGLang; the order is that of the config.
DEFAULT_RULES: tuple[DefaultRule, ...] = (
    DefaultRule(r"re:.*lm_head$", "output head"),
    DefaultRule(r"re:.*embed_tokens$", "embedding table"),
    DefaultRule(r"re:.*visual.*", "vision tower"),
    DefaultRule(r"re:^mtp.*", "multi-token prediction head"),
    DefaultRule(r"re:.*mtp\..*", "multi-token prediction head"),
    DefaultRule(r"re:.*linear_attn\.in_proj_[ab]$", "DeltaNet gate, engines keep it unquantized"),
    DefaultRule(r"re:.*linear_attn\.in_proj_ba$", "DeltaNet gate, engines keep it unquantized"),
    DefaultRule(r"re:.*linear_attn\.conv1d$", "convolution"),
    DefaultRule(r"re:.*mlp\.gate$", "router"),
    DefaultRule(r"re:.*mlp\.shared_expert_gate$", "shared expert's gate"),
    DefaultRule(r"re:(.*\.)?(in_proj_a|in_proj_b|in_proj_ba)$", "DeltaNet gate, engines keep it unquantized"),
    DefaultRule(r"re:(.*\.)?(block_sparse_moe|moe|feed_forward|ffn|mixer)\.gate$", "router"),
    DefaultRule(r"re:(.*\.)?router(\..*)?$", "router"),
    DefaultRule(r"re:(.*\.)?shared_expert_gate$", "shared expert's gate"),
    DefaultRule(
        r"re:(.*\.)?(wte|wpe|tok_embeddings|embed_in|embed_positions|pos_embed|relative_attention_bias)$",
        "embedding table",
    ),
    DefaultRule(r"re:(model\.)?shared$", "embedding table"),
    DefaultRule(r"re:(.*\.)?\w*embeddings?(\..*)?$", "embedding table"),
    DefaultRule(r"re:(embed_out|output)$", "output head"),
    DefaultRule(
        r"re:.*(vision_tower|vision_model|vision_encoder|multi_modal_projector|audio_tower).*", "other modality"
    ),
    DefaultRule(r"re:(.*\.)?conv1d$", "convolution"),
    DefaultRule(r"re:(.*[._])?(layer)?norm\w*$", "norm"),
    DefaultRule(r"re:(.*\.)?(A_log|dt_bias)$", "state-space parameter"),
)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the user asked for: patterns are literal module names, or `re:` and a regex matched from the start."""

    ignore: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    use_defaults: bool = True
    like: SiblingLayers | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to a tensor: `rule` is the pattern that decided, or "" where shape or default behaviour did."""

    quantize: bool
    reason: str
    rule: str = ""


_LINEAR = Decision(True, "linear weight")


class TensorDecision(NamedTuple):
    """A source tensor and its fate."""

    candidate: Candidate
    decision: Decision


@dataclass(frozen=True, slots=True)
class Selection:
    """Every tensor's fate, and the fused groups among the weights that become FP4."""

    tensors: tuple[TensorDecision, ...]
    groups: tuple[FusedGroup, ...]


def select(candidates: Sequence[Candidate], rules: Rules) -> Selection:
    """Decide every tensor; fused groups and a layer's routed experts are quantized whole or kept whole.

    Raises RuleError for patterns that are invalid, match nothing, or split a group, and UnsupportedTensorError for a
    weight that was asked for and cannot be quantized.
    """
    hits = _user_hits(candidates, rules)
    alike = rules.like.chosen(weight.module for item in candidates for weight in item.weights) if rules.like else None
    defaults = _Defaults(DEFAULT_RULES if rules.use_defaults else ())
    decided = [TensorDecision(item, _decide(item, hits, defaults, alike)) for item in candidates]
    groups = fused_groups(weight.module for item in candidates for weight in item.weights)
    decided = _keep_groups_whole(decided, groups)
    quantized = {w.module for item in decided if item.decision.quantize for w in item.candidate.weights}
    if not quantized:
        raise RuleError("nothing is left to quantize: every weight is ignored or has a shape that NVFP4 cannot hold")
    return Selection(tuple(decided), tuple(group for group in groups if group.members[0] in quantized))


@dataclass(frozen=True, slots=True)
class _Hits:
    """Which names the user's patterns matched: name -> pattern."""

    ignored: Mapping[str, str]
    targeted: Mapping[str, str]


def _names(candidate: Candidate) -> list[str]:
    """Return every name a pattern may use for a tensor: an expert stack answers to its experts' and its parent's too."""
    own = [candidate.module]
    if candidate.is_stack:
        own += [candidate.module.rpartition(".")[0], *(weight.module for weight in candidate.weights)]
    return own


def _user_hits(candidates: Sequence[Candidate], rules: Rules) -> _Hits:
    if not rules.ignore and not rules.targets:
        return _Hits({}, {})
    names = list(dict.fromkeys(name for item in candidates for name in _names(item)))
    found = match_names([*rules.ignore, *rules.targets], names)
    for option, patterns in (("ignore pattern", rules.ignore), ("target pattern", rules.targets)):
        for pattern in patterns:
            if not found[pattern]:
                raise unmatched_error(pattern, option, names)
    _check_targets(candidates, rules.targets, found)
    return _Hits(
        {name: pattern for pattern in rules.ignore for name in found[pattern]},
        {name: pattern for pattern in rules.targets for name in found[pattern]},
    )


def _check_targets(
    candidates: Sequence[Candidate], targets: Iterable[str], found: Mapping[str, frozenset[str]]
) -> None:
    """Refuse a target that names, or matches only, what the format cannot hold."""
    for pattern in targets:
        matched = [item for item in candidates if not found[pattern].isdisjoint(_names(item))]
        obstacles = [(item, _obstacle(item)) for item in matched]
        if all(text for _, text in obstacles):
            item, text = obstacles[0]
            raise UnsupportedTensorError(
                f"target pattern {quote(pattern)}: {quote(item.module)} cannot be NVFP4: {text}"
            )


def _obstacle(candidate: Candidate) -> str:
    """Return why the format cannot hold a tensor, or "" if it can."""
    if not candidate.weights:
        return candidate.obstacle
    weight = candidate.weights[0]
    if not weight.size:
        return f"shape [{weight.rows}, {weight.columns}] is empty"
    if weight.columns % BLOCK_SIZE:
        return f"{weight.columns} columns are not a multiple of {BLOCK_SIZE}"
    return ""


class _Defaults:
    """The default rules, asked once for all modules whose names differ in numbers only: no rule looks at a number."""

    def __init__(self, rules: Iterable[DefaultRule]) -> None:
        self._rules = [(rule, re.compile(rule.pattern.removeprefix(REGEX_PREFIX))) for rule in rules]
        self._known: dict[str, DefaultRule | None] = {}

    def rule(self, module: str) -> DefaultRule | None:
        """Return the first rule that keeps a module, if there is one."""
        kind = name_pattern(module, "0")
        if kind not in self._known:
            self._known[kind] = next((rule for rule, regex in self._rules if regex.match(kind)), None)
        return self._known[kind]


def _decide(
    item: Candidate,
    hits: _Hits,
    defaults: _Defaults,
    alike: Collection[str] | None,
) -> Decision:
    if pattern := _user_pattern(item, hits.ignored):
        return Decision(False, "ignored as asked", pattern)
    if obstacle := _obstacle(item):
        return Decision(False, obstacle)
    if pattern := _user_pattern(item, hits.targeted):
        decision = Decision(True, "targeted as asked", pattern)
    elif alike is not None:
        if not any(weight.module in alike for weight in item.weights):
            return Decision(False, "kept in the checkpoint to be like, as asked", "like")
        decision = Decision(True, "quantized in the checkpoint to be like, as asked", "like")
    else:
        rule = defaults.rule(item.module) or (defaults.rule(item.weights[0].module) if item.is_stack else None)
        if rule is not None:
            return Decision(False, rule.reason, rule.pattern)
        decision = _LINEAR
    if item.tensor.info.dtype not in SOURCE_DTYPES:
        raise UnsupportedTensorError(
            f"{quote(item.module)} in {quote(item.tensor.shard)} is {item.tensor.info.dtype}, "
            f"expected one of {', '.join(SOURCE_DTYPES)}: ignore it to keep it as it is"
        )
    return decision


def _user_pattern(item: Candidate, matched: Mapping[str, str]) -> str:
    """Return the user's pattern that decides a tensor, or ""; part of a stack cannot be decided alone."""
    if not matched:
        return ""
    names = [name for name in _names(item) if name in matched]
    if not names:
        return ""
    weights = {weight.module for weight in item.weights}
    if item.is_stack and weights.issuperset(names) and not weights.issubset(names):
        raise RuleError(
            f"pattern {quote(matched[names[0]])} splits expert stack {quote(item.module)}: "
            f"it matches {len(names)} of {len(weights)} experts' weights"
        )
    return matched[names[0]]


def _keep_groups_whole(decided: list[TensorDecision], groups: Iterable[FusedGroup]) -> list[TensorDecision]:
    """Return the decisions with every group that cannot be quantized whole kept whole, or raise RuleError."""
    changed: dict[int, Decision] = {}
    for group, rows in _undivided(decided, groups):
        current = [changed.get(row, decided[row].decision) for row in rows]
        if len({each.quantize for each in current}) < 2:
            continue
        kept = [(row, each) for row, each in zip(rows, current, strict=True) if not each.quantize]
        wanted = [(row, each) for row, each in zip(rows, current, strict=True) if each.quantize]
        for row, each in [*kept, *wanted]:
            if each.reason.endswith("as asked"):
                other = kept[0] if each.quantize else wanted[0]
                raise RuleError(
                    f"pattern {quote(each.rule)} splits fused group {quote(group)}: {quote(decided[row].candidate.module)} "
                    f"would be {_fate(each)}, {quote(decided[other[0]].candidate.module)} {_fate(other[1])}"
                )
        partner, why = decided[kept[0][0]].candidate.module, kept[0][1].reason
        for row, _ in wanted:
            changed[row] = Decision(False, f"fused with {quote(partner)}, which is kept: {why}")
    return [TensorDecision(item.candidate, changed.get(row, item.decision)) for row, item in enumerate(decided)]


def _fate(decision: Decision) -> str:
    return "quantized" if decision.quantize else "kept"


def _undivided(decided: Sequence[TensorDecision], groups: Iterable[FusedGroup]) -> list[tuple[str, list[int]]]:
    """Return the sets of tensors (by position) that share one fate: routed experts first, then fused layers."""
    rows = {weight.module: row for row, item in enumerate(decided) for weight in item.candidate.weights}
    experts: dict[str, list[int]] = {}
    for module, row in rows.items():
        parent = experts_parent(module)
        if parent is not None:
            experts.setdefault(parent, []).append(row)
    fused = [(group.name, [rows[name] for name in group.members]) for group in groups if len(group.members) > 1]
    return [*((name, list(dict.fromkeys(found))) for name, found in experts.items()), *fused]
