"""Give every fused group one input scale, or say why that is not possible."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from ..errors import ScaleError, quote
from ..names.bridge import Bridge, bridge_names
from ..names.fusion import FusedGroup, experts_parent
from .reading import SHOWN, InputScales, is_calibrated


@dataclass(frozen=True, slots=True)
class AssignedScales:
    """The divisor (float32) of every fused group, by the group's name.

    `warnings` are lines for people, `filled` is how many experts took their layer's smallest divisor, `digest` is the
    SHA-256 of the assignment, hexadecimal.
    """

    divisors: Mapping[str, float]
    warnings: tuple[str, ...]
    filled: int
    digest: str


def assign_input_scales(
    scales: InputScales, groups: Iterable[FusedGroup], *, kept: Collection[str] = ()
) -> AssignedScales:
    """Return one divisor for every group: its members' smallest, so that no member's input is clipped.

    `groups` are those to be quantized, `kept` the source's other modules, whose scales are ignored. Experts that
    calibration never reached take their layer's smallest divisor for that projection. Raises ScaleError for scales
    that fit no module or several, and for modules whose scale is missing, uncalibrated or below 1.
    """
    wanted = tuple(groups)
    members = [member for group in wanted for member in group.members]
    bridge = bridge_names(scales.divisors, [*members, *kept])
    found = {member: _look_up(scales, bridge, member) for member in members}
    _check_names(scales, bridge, found)
    usable = {name: value for name, value in found.items() if value is not None and is_calibrated(value)}
    _check_values(scales, found, usable)
    values = {group.name: [usable[member] for member in group.members if member in usable] for group in wanted}
    divisors = {name: min(each) for name, each in values.items() if each}
    filled = _fill(scales, wanted, divisors)
    used = {name for member in members for name in bridge.names(member)}
    warnings = (_disagreements(values), _ignored([name for name in scales.divisors if name not in used]))
    digest = hashlib.sha256("\n".join(f"{name}={divisors[name].hex()}" for name in sorted(divisors)).encode())
    return AssignedScales(divisors, tuple(line for line in warnings if line), filled, digest.hexdigest())


def _look_up(scales: InputScales, bridge: Bridge, member: str) -> float | None:
    """Return a module's divisor, its own or its expert stack's, or None if nothing is written for it."""
    values = [scales.divisors[name] for name in bridge.names(member)]
    return next((value for value in values if is_calibrated(value)), values[0] if values else None)


def _check_names(scales: InputScales, bridge: Bridge, found: Mapping[str, float | None]) -> None:
    if bridge.ambiguous:
        raise _error(scales, bridge.ambiguous, "could belong to several modules", "write the modules' full names")
    if bridge.unknown:
        raise _error(scales, bridge.unknown, "belong to no module of the source", f"it has {_first(found)}")
    missing = [name for name, value in found.items() if value is None and experts_parent(name) is None]
    if missing:
        raise _error(scales, missing, "are missing", "calibrate these modules too, or keep them with --ignore")


def _check_values(scales: InputScales, found: Mapping[str, float | None], usable: Mapping[str, float]) -> None:
    dead = [f"{name} = {found[name]}" for name in found if name not in usable and experts_parent(name) is None]
    if dead:
        raise _error(scales, dead, "are marks of no calibration (0, NaN, inf or 1)", "calibrate these modules")
    low = [f"{name} = {value:.3g}" for name, value in usable.items() if value < 1]
    if low:
        raise _error(scales, low, "are implausible, with a divisor (2688/amax) below 1", "is their kind right?")


def _fill(scales: InputScales, groups: Iterable[FusedGroup], divisors: dict[str, float]) -> int:
    """Give the experts' groups that have no divisor their layer's smallest; return how many experts these are."""
    smallest: dict[str, float] = {}
    empty: dict[str, str] = {}
    for group in groups:
        # What a layer's experts share for one projection: their group's name without the expert's number.
        layer = f"{experts_parent(group.name)}.{group.name.rpartition('.')[2]}"
        if group.name in divisors:
            smallest[layer] = min(divisors[group.name], smallest.get(layer, math.inf))
        else:
            empty[group.name] = layer
    lost = [name for name, layer in empty.items() if layer not in smallest]
    if lost:
        raise _error(scales, lost, "are missing, as are those of the layer's other experts", "use more text")
    divisors.update({name: smallest[layer] for name, layer in empty.items()})
    return len({name.rpartition(".")[0] for name in empty})


def _disagreements(values: Mapping[str, Sequence[float]]) -> str:
    ratios = {name: max(each) / min(each) for name, each in values.items() if each and min(each) != max(each)}
    if not ratios:
        return ""
    return (
        f"input scales disagree inside {len(ratios)} fused groups, by up to {max(ratios.values()):.3g} times: "
        f"the smallest divisor of each holds for all its members: {_first(ratios)}"
    )


def _ignored(names: Collection[str]) -> str:
    return f"{len(names)} input scales of modules that are kept are ignored: {_first(names)}" if names else ""


def _first(names: Collection[str]) -> str:
    more = ", ..." if len(names) > SHOWN else ""
    return ", ".join(quote(name) for name in islice(names, SHOWN)) + more


def _error(scales: InputScales, names: Collection[str], what: str, advice: str) -> ScaleError:
    return ScaleError(f"input scales {quote(scales.origin)}: {len(names)} {what}: {_first(names)}; {advice}")
