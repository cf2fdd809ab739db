"""Decide which tensors are quantized, from their names, shapes and place in the model: module types are not known.

Called by `format_choice`, which then gives each of them a format. What the user ignores is kept; what the user targets is
quantized; of the rest, the defaults choose the linear layers of the decoder's blocks. Reads no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.weights import Candidate, Weight
from ..errors import RuleError, UnsupportedTensorError, quote
from ..names.fusion import FusedGroup, fused_groups, parameters, undivided
from ..names.patterns import match_names, unmatched_error
from ..names.structure import Structure
from ..nvfp4 import BLOCK_SIZE
from .defaults import DEFAULT_RULES, Defaults, siblings_of

if TYPE_CHECKING:
    from ..scales.sibling import SiblingLayers

__all__ = ["DEFAULT_RULES", "Decision", "Rules", "Selection", "TensorDecision", "select"]
SOURCE_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Rules:
    """What the user asked for: patterns are literal module names, or `re:` and a regex matched from the start.

    `force` allows targets that no engine is known to load.
    """

    ignore: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    use_defaults: bool = True
    like: SiblingLayers | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to a tensor: `rule` is the pattern that decided, or "" where shape or default behaviour did.

    `format` is the name of what a quantized one becomes, once `format_choice` has chosen it; `bf16` where that keeps it.
    """

    quantize: bool
    reason: str
    rule: str = ""
    format: str = ""

    @property
    def is_users(self) -> bool:
        """Whether the user decided, by whatever option."""
        return self.reason.endswith("as asked")

    @property
    def is_format_asked(self) -> bool:
        """Whether a rule of the user's gave it this very format."""
        return self.reason == f"{self.format} as asked"


TARGETED = "targeted as asked"
_LINEAR = Decision(True, "linear weight")
CARRIED = Decision(True, "NVFP4 already, goes over as it is")


class TensorDecision(NamedTuple):
    """A source tensor and what was decided for it."""

    candidate: Candidate
    decision: Decision


@dataclass(frozen=True, slots=True)
class Selection:
    """Every tensor's decision, the groups of quantized weights that share their scales, and where the model's parts lie."""

    tensors: tuple[TensorDecision, ...]
    groups: tuple[FusedGroup, ...]
    structure: Structure

    def quantized(self) -> Iterator[tuple[TensorDecision, Weight]]:
        """Yield every weight that is quantized, with the decision on its tensor."""
        return ((item, weight) for item in self.tensors if item.decision.quantize for weight in item.candidate.weights)

    @property
    def sample_groups(self) -> list[FusedGroup]:
        """The groups of weights, but of a stack's experts only the first's, whose names and formats tell those of all."""
        tensors = (item for item in self.tensors if item.decision.quantize)
        samples = {weight.module for item in tensors for weight in item.candidate.sample}
        return [group for group in self.groups if group.members[0] in samples]


def select(
    candidates: Sequence[Candidate],
    rules: Rules,
    config: Mapping[str, Any] | None = None,
    *,
    activations: bool = False,
) -> Selection:
    """Decide every tensor; what engines build as one parameter is quantized whole or kept whole.

    `config` is the source's config.json, `activations` whether inputs are quantized too. Raises RuleError for patterns
    that are invalid, match nothing, split a parameter, or ask for what no engine loads, and UnsupportedTensorError for a
    weight that was asked for and cannot be quantized.
    """
    infos = [item.tensor.info for item in candidates]
    structure = Structure([(info.name, info.shape) for info in infos], config or {})
    siblings = siblings_of(info.name for info in infos)
    defaults = Defaults(structure, siblings, activations=activations)
    asked = _asked(candidates, rules)
    decided = [TensorDecision(item, _decide(item, asked, defaults)) for item in candidates]
    if any(item.decision is CARRIED for item in decided):
        decided = [_in_mixture(item) for item in decided]
    modules = [weight.module for item in candidates for weight in item.sample]
    decided = _keep_whole(decided, undivided(modules, parameters(modules, siblings)))
    quantized = [w.module for item in decided if item.decision.quantize for w in item.candidate.weights]
    if not quantized:
        reasons = Counter(item.decision.reason for item in decided if len(item.candidate.tensor.info.shape) > 1)
        why = "; ".join(f"{count} matrices: {reason}" for reason, count in reasons.most_common(3))
        raise RuleError(f"nothing is left to quantize: every weight is kept ({why})")
    return Selection(tuple(decided), tuple(fused_groups(quantized)), structure)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the user asked for in this checkpoint: the pattern of each matched name, and the modules of `like`, if given."""

    ignored: Mapping[str, str]
    targeted: Mapping[str, str]
    alike: Collection[str] | None
    rules: Rules


def _asked(candidates: Sequence[Candidate], rules: Rules) -> _Asked:
    alike = rules.like.chosen(weight.module for item in candidates for weight in item.weights) if rules.like else None
    patterns = [(each, "ignore pattern") for each in rules.ignore] + [
        (each, "target pattern") for each in rules.targets
    ]
    found = match_modules(candidates, patterns)
    _check_targets(candidates, rules.targets, found)
    ignored, targeted = (
        {name: pattern for pattern in given for name in found[pattern]} for given in (rules.ignore, rules.targets)
    )
    return _Asked(ignored, targeted, alike, rules)


def match_modules(candidates: Sequence[Candidate], patterns: Sequence[tuple[str, str]]) -> Mapping[str, frozenset[str]]:
    """Return the names that each pattern matches; the patterns come with what a message calls them.

    Raises RuleError for a pattern that is invalid or matches nothing.
    """
    if not patterns:
        return {}
    names = list(dict.fromkeys(name for item in candidates for name in pattern_names(item)))
    found = match_names([pattern for pattern, _ in patterns], names)
    for pattern, option in patterns:
        if not found[pattern]:
            raise unmatched_error(pattern, option, names)
    return found


def pattern_names(candidate: Candidate) -> list[str]:
    """Return every name a pattern may use for a tensor: an expert stack answers to its experts' and its parent's too."""
    own = [candidate.module]
    if candidate.is_stack:
        own += [candidate.module.rpartition(".")[0], *(weight.module for weight in candidate.weights)]
    return own


def _check_targets(
    candidates: Sequence[Candidate], targets: Iterable[str], found: Mapping[str, frozenset[str]]
) -> None:
    """Refuse a target that names, or matches only, what the format cannot hold."""
    for pattern in targets:
        matched = [item for item in candidates if not found[pattern].isdisjoint(pattern_names(item))]
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


def _decide(item: Candidate, asked: _Asked, defaults: Defaults) -> Decision:
    rules = asked.rules
    if pattern := _user_pattern(item, asked.ignored):
        return Decision(False, "ignored as asked", pattern)
    if obstacle := _obstacle(item):
        return Decision(False, obstacle)
    if item.tensor.encoding is not None and item.tensor.encoding.is_nvfp4:
        return CARRIED
    if pattern := _user_pattern(item, asked.targeted):
        _check_loadable(item, pattern, rules, defaults)
        decision = Decision(True, TARGETED, pattern)
    elif asked.alike is not None:
        decision = _as_in(asked.alike, item, "" if rules.force else defaults.unloadable(item))
        if not decision.quantize:
            return decision
    else:
        kept = defaults.kept(item) if rules.use_defaults or (defaults.unloadable(item) and not rules.force) else None
        if kept is not None:
            return Decision(False, kept.reason, kept.pattern)
        decision = _LINEAR
    if item.tensor.info.dtype not in SOURCE_DTYPES:
        raise UnsupportedTensorError(
            f"{quote(item.module)} in {quote(item.tensor.shard)} is {item.tensor.info.dtype}, "
            f"expected one of {', '.join(SOURCE_DTYPES)}: ignore it to keep it as it is"
        )
    return decision


def _in_mixture(item: TensorDecision) -> TensorDecision:
    """Return the decision on a tensor of a source that is NVFP4 in part: what is FP8 there was chosen to be, and stays."""
    candidate, decision = item
    encoding = candidate.tensor.encoding
    if not decision.quantize or encoding is None or not encoding.is_fp8 or decision.reason == TARGETED:
        return item
    return TensorDecision(candidate, Decision(False, "FP8 beside NVFP4 in the source"))


def _as_in(alike: Collection[str], item: Candidate, unloadable: str) -> Decision:
    if not any(weight.module in alike for weight in item.weights):
        return Decision(False, "kept in the checkpoint to be like, as asked", "like")
    if unloadable:  # of FP8 checkpoints: engines build some layers in FP8 that they never build in FP4
        return Decision(False, f"{unloadable}, although quantized in the checkpoint to be like")
    return Decision(True, "quantized in the checkpoint to be like, as asked", "like")


def _check_loadable(item: Candidate, pattern: str, rules: Rules, defaults: Defaults) -> None:
    what = "" if rules.force else defaults.unloadable(item)
    if what:
        raise RuleError(
            f"target {quote(pattern)}: {quote(item.module)} is {what}: no engine loads that in FP4; force it to insist"
        )


def _user_pattern(item: Candidate, matched: Mapping[str, str]) -> str:
    """Return the user's pattern that decides a tensor, or ""; part of a stack cannot be decided alone."""
    if not matched:
        return ""
    names = [name for name in pattern_names(item) if name in matched]
    if not names:
        return ""
    weights = {weight.module for weight in item.weights}
    if item.is_stack and weights.issuperset(names) and not weights.issubset(names):
        raise RuleError(
            f"pattern {quote(matched[names[0]])} splits expert stack {quote(item.module)}: "
            f"it matches {len(names)} of {len(weights)} experts' weights"
        )
    return matched[names[0]]


def _keep_whole(decided: Sequence[TensorDecision], sets: Iterable[FusedGroup]) -> list[TensorDecision]:
    """Return the decisions with every set of modules kept that is quantized in part; raises RuleError where the user said so."""
    result = list(decided)
    rows = {weight.module: row for row, item in enumerate(decided) for weight in item.candidate.sample}
    for name, members in sets:
        own = dict.fromkeys(rows[member] for member in members)
        kept = [row for row in own if not result[row].decision.quantize]
        quantized = [row for row in own if result[row].decision.quantize]
        if not kept or not quantized:
            continue
        partner = result[kept[0]]
        for row in (*kept, *quantized):
            if result[row].decision.is_users:
                raise _split_error(name, result[row], partner if row in quantized else result[quantized[0]])
        reason = f"fused with {quote(partner.candidate.module)}, which is kept: {partner.decision.reason}"
        for row in quantized:
            result[row] = TensorDecision(result[row].candidate, Decision(False, reason))
    return result


def _split_error(name: str, item: TensorDecision, other: TensorDecision) -> RuleError:
    own, others = ("quantized" if each.decision.quantize else "kept" for each in (item, other))
    return RuleError(
        f"pattern {quote(item.decision.rule)} splits fused group {quote(name)}: {quote(item.candidate.module)} "
        f"would be {own}, {quote(other.candidate.module)} {others}"
    )
