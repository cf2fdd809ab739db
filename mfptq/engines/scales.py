"""Judge the numbers that small tensors hold: scales of fused partners, of experts, and of inputs.

Called by `checking.check` where the values are known. compressed-tensors stores divisors (2688 / amax), ModelOpt
multipliers (amax / 2688): the same faults, told apart by the names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from .findings import Fault, Severity, Text
from .judge import View
from .layers import Layer
from .modules import Contents, Module

WEIGHT_SCALES = ("weight_global_scale", "weight_scale_2")
INPUT_SCALES = ("input_global_scale", "input_scale")
IMPLAUSIBLE_SPREAD = 1e4  # of input scales within one kind of layer: the widest seen in sound checkpoints is about 100

_UNCALIBRATED = Text(
    "the input scale is one of a layer that calibration never reached (0, 1, NaN or infinity)",
    "the layer's activations are clipped or lost; engines that use one scale for all experts of a layer lose them all",
    "calibrate with more text, or fill it with the layer's smallest input_global_scale",
)
_BROKEN = Text(
    "the global scale is zero, negative, NaN or infinite",
    "the layer gives NaN or zeros",
    "quantize the layer again",
)


def value_faults(held: Contents, values: Mapping[str, float]) -> Iterator[Fault]:
    """Yield global scales and input scales that are no scales, or far off: each engine fails with them alike."""
    if not values:
        return
    for module in held.modules.values():
        if module.scheme is not None:
            yield from _value_faults(module, values)
    yield from _spread_faults(held, values)


def partner_faults(seen: View) -> Iterator[Fault]:
    """Yield scales that differ between modules for which an engine keeps one scale."""
    if not seen.subject.scalars:
        return
    for layer in seen.layers.served.values():
        groups = _expert_pairs(layer) if layer.kind == "experts" else [layer.members]
        for members in groups:
            if len(members) > 1:
                yield from _partner_faults(members, seen, is_experts=layer.kind == "experts")


def _value_faults(module: Module, values: Mapping[str, float]) -> Iterator[Fault]:
    for suffix in module.parts:
        value = values.get(f"{module.name}.{suffix}")
        if value is None:
            continue
        if (suffix in WEIGHT_SCALES and not (math.isfinite(value) and value > 0)) or (
            suffix in INPUT_SCALES and value < 0
        ):
            yield Fault("broken-scale", "error", "", module.name, *_BROKEN)
        elif suffix in INPUT_SCALES and (not math.isfinite(value) or value in (0.0, 1.0)):
            severity: Severity = "warning" if value == 1.0 else "error"
            yield Fault("uncalibrated", severity, "", module.name, *_UNCALIBRATED)


def _expert_pairs(layer: Layer) -> Iterator[list[Module]]:
    """Yield gate and up of each expert: an engine keeps one global scale for the two."""
    experts: dict[str, list[Module]] = {}
    for module in layer.members:
        parent, _, leaf = module.name.rpartition(".")
        if leaf in ("gate_proj", "up_proj", "w1", "w3"):
            experts.setdefault(parent, []).append(module)
    yield from experts.values()


def _partner_faults(members: list[Module], seen: View, *, is_experts: bool) -> Iterator[Fault]:
    for suffix in (*WEIGHT_SCALES, *INPUT_SCALES):
        found = {
            module.name: value
            for module in members
            if (value := seen.subject.scalars.get(f"{module.name}.{suffix}")) is not None and math.isfinite(value)
        }
        if len(set(found.values())) < 2 or any(value <= 0 for value in found.values()):
            continue
        place = members[0].name.rpartition(".")[0]
        ratio = max(found.values()) / min(found.values())
        yield _unequal(suffix, place, (seen, ratio), is_experts=is_experts)


def _unequal(suffix: str, place: str, measured: tuple[View, float], *, is_experts: bool) -> Fault:
    seen, ratio = measured
    engine = seen.architecture.engine
    bound = f"up to {_percent(ratio)}"
    if suffix in INPUT_SCALES:
        told = Text(
            f"fused partners have unequal {suffix}",
            f"the engine takes one for all: activations of the others are clipped or coarser ({bound})",
            "give all the one of the largest amax; unequal ones mean that a calibration mixed up names",
        )
        return Fault("unequal-input-scales", "warning", seen.architecture.title, place, *told)
    partners = "gate and up of an expert" if is_experts else "fused partners"
    kept = "the first's" if is_experts else "the largest"
    effect = f"the engine takes {kept} for all: the others' weights are wrong by a factor ({bound})"
    if engine == "sglang":
        effect += "; weight-only, it refuses the layer"
    told = Text(
        f"{partners} have unequal {suffix}", effect, "unify them: quantize the partners again with one global scale"
    )
    return Fault("unequal-weight-scales", "error", seen.architecture.title, place, *told)


def _percent(ratio: float) -> str:
    """Return by how much a value is off in the worst place, in coarse steps so that like places fall together."""
    error = 1 - 1 / ratio
    for step in (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        if error <= step:
            return f"{step:.0%}"
    return "100%"


def _spread_faults(held: Contents, values: Mapping[str, float]) -> Iterator[Fault]:
    """Yield input scales thousands of times those of the same layers elsewhere: no sound calibration gives them."""
    kinds: dict[str, list[tuple[float, str]]] = {}
    for name, value in values.items():
        module, _, suffix = name.rpartition(".")
        if suffix in INPUT_SCALES and value > 0 and value != 1 and math.isfinite(value) and module in held.modules:
            kinds.setdefault(f"{module.rpartition('.')[2]}.{suffix}", []).append((value, module))
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
