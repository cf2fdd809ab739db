"""Find the layers that share a format, what each format costs them, and how much their errors matter.

Called by `execution.size_target`. Reads no weight: errors of formats are found by `execution.format_errors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..checkpoint.weights import Candidate, Weight
from ..names.engine import experts_parent
from ..names.fusion import FusedGroup
from .allocation import NORM, REFERENCE, Option, Unit
from .formats import FORMATS, KEEP
from .weight_targets import WeightRun, weight_target

if TYPE_CHECKING:
    from .plan import ConversionPlan

# Squared relative error of a layer's inputs as a format's kernels round them: 9.2 % for E2M1 in blocks, 2.65 % for E4M3.
INPUT_ERRORS: Final[Mapping[str, float]] = {"nvfp4": 0.0085, "fp8-dynamic": 0.0007}
# How much the output suffers from the error of a kind of layer, by the last parts of its name: means over the layers of
# Gemma 3 270M and all-MiniLM-L6-v2, each rounded alone to NVFP4; the output of attention counts as 1.
ROLES: Final = tuple(
    (re.compile(rf"(^|.*\.)({pattern})$"), weight)
    for pattern, weight in (
        (r"(o|out)_proj|attention\.output\.dense|attn\.c_proj|wo", 1.0),
        (r"(q|k|v|qkv|q_[ab]|kv_[ab]|in)_proj.*|in_proj_.*|query|key|value|(attn\.)?c_attn|w[qkv].*", 2.5),
        (r"(gate|up|gate_up)_proj|intermediate\.dense|w1|w3|fc1|c_fc|wi(_\d)?", 2.6),
        (r"down_proj|output\.dense|w2|fc2|c_proj", 1.7),
    )
)
OTHER_ROLE: Final = 2.0

Errors = Mapping[str, Mapping[str, float]]  # by fused group, then by format, NORM or REFERENCE


@dataclass(frozen=True, slots=True)
class Layers:
    """What a unit is made of: fused groups of `weights`, stored as the source's tensors `items`."""

    name: str
    groups: tuple[FusedGroup, ...]
    items: tuple[Candidate, ...]
    weights: tuple[Weight, ...]


def changeable_layers(plan: ConversionPlan) -> list[Layers]:
    """Return the layers whose format no rule has fixed, those together that have one format; sorted by name."""
    items = {weight.module: item for item, weight in plan.selection.quantized()}
    together: dict[str, list[FusedGroup]] = {}
    for group in plan.selection.groups:
        together.setdefault(experts_parent(group.members[0]) or group.name, []).append(group)
    found = []
    for name, groups in sorted(together.items()):
        modules = [member for group in groups for member in group.members]
        members = [items[module] for module in modules]
        fixed = any(
            item.decision.is_format_asked or FORMATS[item.decision.format].family != "nvfp4" for item in members
        )
        if not fixed and plan.carried.weights.keys().isdisjoint(modules):
            candidates = {item.candidate.module: item.candidate for item in members}
            weights = {weight.module: weight for item in candidates.values() for weight in item.weights}
            found.append(
                Layers(name, tuple(groups), tuple(candidates.values()), tuple(weights[each] for each in modules))
            )
    return found


def unit_of(plan: ConversionPlan, layers: Layers, formats: Iterable[str], errors: Errors) -> Unit:
    """Return a unit with what each format costs; `errors` are those of its groups."""
    base = plan.format_of(layers.weights[0]).name
    impact = _impact(plan, layers)
    reference = sum(errors[group.name][REFERENCE] for group in layers.groups)
    options = []
    for name in (base, *(each for each in formats if each != base)):
        error = 0.0 if name == KEEP else sum(_error(errors[group.name], name) for group in layers.groups)
        options.append(Option(name, _size(plan, layers, name), impact * error / reference if reference else 0.0))
    modules = tuple(item.module for item in layers.items)
    return Unit(layers.name, modules, sum(weight.size for weight in layers.weights), tuple(options))


def _error(found: Mapping[str, float], name: str) -> float:
    """Return the squared error that a format leaves in a layer's output, of its weights and of its inputs."""
    return found[name] + INPUT_ERRORS.get(name, 0.0) * found[NORM]


def _size(plan: ConversionPlan, layers: Layers, name: str) -> int:
    """Return the bytes of the output's tensors if the layers have a format."""
    if name == KEEP:
        return sum(item.tensor.info.nbytes for item in layers.items)
    targets = (weight_target(each.module, FORMATS[name], plan.method, plan.calibration) for each in layers.weights)
    return sum(WeightRun(target, (each,)).weight_bytes for target, each in zip(targets, layers.weights, strict=True))


def _impact(plan: ConversionPlan, layers: Layers) -> float:
    """Return what plain NVFP4 in these layers does to the model's output: as it was measured, else by their roles.

    That of experts is then the sum of those of their projections.
    """
    measured = None if plan.calibration is None else plan.calibration.sensitivity(layers.weights[0].module)
    return sum({_role(group.members[0]) for group in layers.groups}) if measured is None else measured


def _role(module: str) -> float:
    """Return how much a layer of this name matters."""
    return next((weight for pattern, weight in ROLES if pattern.match(module)), OTHER_ROLE)


def basis(plan: ConversionPlan) -> str:
    """Return what errors are predicted from, in words."""
    if plan.calibration is None:
        return "errors of weights and the roles of layers: weaker than a calibration file with sensitivities"
    if plan.calibration.sensitivities:
        return "the sensitivity of each layer, measured by calibration, and errors of its output"
    return "errors of the layers' outputs and their roles: weaker than a calibration file with sensitivities"
