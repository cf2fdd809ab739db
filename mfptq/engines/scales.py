"""Judge the numbers that small tensors hold: scales of fused partners, of experts, and of inputs.

Called by `checking.judge` where the values are known. compressed-tensors stores divisors (2688 / amax), ModelOpt
multipliers (amax / 2688): the same faults, told apart by the names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .findings import Fault, Severity, Text
from .judge import Subject, View
from .layers import Layer
from .modules import Module

WEIGHT_SCALES = ("weight_global_scale", "weight_scale_2")
INPUT_SCALES = ("input_global_scale", "input_scale")
SCALES = (*WEIGHT_SCALES, *INPUT_SCALES)
IMPLAUSIBLE_SPREAD = 1e4  # of input scales within one kind of layer: the widest seen in sound checkpoints is about 100

_UNCALIBRATED = Text(
    "the input scale is one of a layer that calibration never reached (0, 1, NaN or infinity)",
    "the layer's activations are clipped or lost; engines that use one scale for all experts of a layer lose them all",
    "calibrate with more text; mfptq repair gives experts the smallest input_global_scale of their layer",
)
_BROKEN = Text(
    "the global scale is zero, negative, NaN or infinite",
    "the layer gives NaN or zeros",
    "quantize the layer again",
)


def value_faults(subject: Subject) -> Iterator[Fault]:
    """Yield global scales and input scales that are no scales, or far off: each engine fails with them alike."""
    if not subject.scalars:
        return
    for module in subject.stored.modules.values():
        if module.scheme is not None:
            yield from _value_faults(module, subject.scalars)
    yield from _spread_faults(subject)


def partner_faults(seen: View) -> Iterator[Fault]:
    """Yield scales that differ between modules for which an engine keeps one scale."""
    if not seen.subject.scalars:
        return
    unequal: dict[tuple[str, bool], dict[str, float]] = {}
    for layer in seen.layers.served.values():
        is_experts = layer.kind == "experts"
        suffixes = [suffix for suffix in SCALES if any(suffix in module.parts for module in layer.members)]
        for members in _expert_pairs(layer) if is_experts else [[module.name for module in layer.members]]:
            for suffix, ratio in _ratios(members, suffixes, seen.subject.scalars):
                place = members[0].rpartition(".")[0]
                unequal.setdefault((suffix, is_experts), {})[place] = ratio
    for (suffix, is_experts), places in unequal.items():
        code, severity, told = _unequal(suffix, max(places.values()), is_experts=is_experts)
        for place in places:
            yield Fault(code, severity, seen.architecture.title, place, *told)


def _value_faults(module: Module, values: Mapping[str, float]) -> Iterator[Fault]:
    for name, suffix, value in _scales(module, SCALES, values):
        if (suffix in WEIGHT_SCALES and not (math.isfinite(value) and value > 0)) or (
            suffix in INPUT_SCALES and value < 0
        ):
            yield Fault("broken-scale", "error", "", name, *_BROKEN)
        elif suffix in INPUT_SCALES and (not math.isfinite(value) or value in (0.0, 1.0)):
            severity: Severity = "warning" if value == 1.0 else "error"
            yield Fault("uncalibrated", severity, "", name, *_UNCALIBRATED)


def _expert_pairs(layer: Layer) -> Iterable[list[str]]:
    """Return gate and up of each expert: an engine keeps one global scale for the two."""
    experts: dict[str, list[str]] = {}
    for module in layer.members:
        if module.name.endswith((".gate_proj", ".up_proj", ".w1", ".w3")):
            for name in module.names:
                experts.setdefault(name.rpartition(".")[0], []).append(name)
    return experts.values()


def _scales(module: Module, suffixes: Iterable[str], values: Mapping[str, float]) -> Iterator[tuple[str, str, float]]:
    """Yield the known scales of all modules that one stands for, each with its module's name and its own suffix."""
    for suffix in suffixes:
        for name in module.names if suffix in module.parts else ():
            value = values.get(f"{name}.{suffix}")
            if value is not None:
                yield name, suffix, value


def _ratios(
    members: Sequence[str], suffixes: Iterable[str], values: Mapping[str, float]
) -> Iterator[tuple[str, float]]:
    """Yield the kinds of scale that differ between fused partners, with the largest over the smallest."""
    for suffix in suffixes:
        known = (values.get(f"{name}.{suffix}") for name in members)
        found = [value for value in known if value is not None and math.isfinite(value)]
        if len(set(found)) > 1 and min(found) > 0:
            yield suffix, max(found) / min(found)


def _unequal(suffix: str, ratio: float, *, is_experts: bool) -> tuple[str, Severity, Text]:
    """Return code, severity and text for scales that differ by up to a ratio: one finding for all places."""
    bound = f"by up to {max(1 - 1 / ratio, 0.001):.1%}"
    partners = "gate and up of an expert" if is_experts else "fused partners"
    what = f"{partners} have unequal {suffix}"
    kept = "the first's" if is_experts else "the largest"
    if suffix in INPUT_SCALES:
        effect = f"the engine takes one for all: activations of the others are clipped or coarser ({bound})"
        remedy = (
            "mfptq repair gives all the one of the largest amax; unequal ones mean that a calibration mixed up names"
        )
        return "unequal-input-scales", "warning", Text(what, effect, remedy)
    effect = (
        f"the engine takes {kept} for all: the others' weights are wrong {bound}; SGLang refuses them if weight-only"
    )
    remedy = "mfptq repair gives them one scale; or quantize the partners again with one"
    return "unequal-weight-scales", "error", Text(what, effect, remedy)


def _spread_faults(subject: Subject) -> Iterator[Fault]:
    """Yield input scales thousands of times those of the same layers elsewhere: no sound calibration gives them."""
    kinds: dict[str, list[tuple[float, str]]] = {}
    for module in subject.stored.modules.values():
        for name, suffix, value in _scales(module, INPUT_SCALES, subject.scalars):
            if value > 0 and value != 1 and math.isfinite(value):
                kinds.setdefault(f"{name.rpartition('.')[2]}.{suffix}", []).append((value, name))
    for kind, found in kinds.items():
        middle = sorted(found)[len(found) // 2][0]
        told = Text(
            f"{kind.rpartition('.')[2]} is more than {IMPLAUSIBLE_SPREAD:g} times off that of like layers",
            "the layer's activations are clipped or lost",
            "look at the calibration of this layer",
        )
        for value, name in found:
            if not 1 / IMPLAUSIBLE_SPREAD < value / middle < IMPLAUSIBLE_SPREAD:
                yield Fault("implausible-input-scale", "warning", "", name, *told)
