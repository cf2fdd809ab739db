"""Give every fused group one input scale, or say why that is not possible.

Called by `planning.weight_targets`, whatever the scales came from: a file, another checkpoint, or a calibration file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import counted, listed, quote
from ..names.bridge import Bridge
from ..names.engine import experts_parent
from ..names.fusion import FusedGroup
from ..storage.digest import text_sha256
from .experts import fill_experts, is_calibrated
from .input_scales import AUTO, InputScales
from .matching import check_complete, match_names, names_error

UNCALIBRATED = (
    "scale is a mark of no calibration (0, NaN, inf or 1)",
    "scales are marks of no calibration (0, NaN, inf or 1)",
)
BELOW_ONE = "input_global_scale (2688/amax) is below 1", "input_global_scales (2688/amax) are below 1"


@dataclass(frozen=True, slots=True)
class AssignedScales:
    """The `input_global_scale` (float32) of every fused group, by the group's name.

    `warnings` are lines for people, `filled` is how many experts took their layer's smallest scale, `digest` is the
    SHA-256 of the assignment, hexadecimal, `about` says how the scales came about.
    """

    global_scales: Mapping[str, float]
    warnings: tuple[str, ...]
    filled: int
    digest: str
    about: str = "imported"


def assign_input_scales(
    scales: InputScales, groups: Iterable[FusedGroup], *, kept: Collection[str] = ()
) -> AssignedScales:
    """Return one scale for every group: its members' smallest, so that no member's input is clipped.

    `groups` are those to be quantized, `kept` the source's other modules, whose scales are ignored. Experts that
    calibration never reached take their layer's smallest scale for that projection. Raises ScaleError for scales
    that fit no module or several, and for modules whose scale is missing, uncalibrated or below 1.
    """
    wanted, origin = tuple(groups), f"input scales {quote(scales.origin)}"
    members = [member for group in wanted for member in group.members]
    bridge = match_names(origin, scales.global_scales, [*members, *kept])
    found = {member: value for member in members if (value := _look_up(scales, bridge, member)) is not None}
    usable = {name: value for name, value in found.items() if is_calibrated(value)}
    # A scale holds for all members of a group, since these have one input: layers that use another layer's keys and values never
    # run their own k_proj and v_proj, so calibration does not see these.
    lacking = [member for member in members if member not in usable and experts_parent(member) is None]
    if any(usable.keys().isdisjoint(group.members) and experts_parent(group.members[0]) is None for group in wanted):
        check_complete(origin, members, found)
        raise names_error(
            origin, [f"{name} = {found[name]}" for name in lacking], UNCALIBRATED, "calibrate these modules"
        )
    low = [f"{name} = {value:.3g}" for name, value in usable.items() if value < 1]
    if low:
        raise names_error(origin, low, BELOW_ONE, "is their kind right?")
    values = {group.name: [usable[member] for member in group.members if member in usable] for group in wanted}
    chosen = {name: min(each) for name, each in values.items() if each}
    filled = fill_experts(origin, wanted, chosen)
    used = {name for member in members for name in bridge.names(member)}
    warnings = (
        f"input scales are {scales.about}; compare with `evaluate`" if scales.origin == AUTO else "",
        _disagreements(values),
        _partners(lacking),
        _ignored([name for name in scales.global_scales if name not in used]),
    )
    digest = text_sha256("\n".join(f"{name}={chosen[name].hex()}" for name in sorted(chosen)))
    return AssignedScales(chosen, tuple(filter(None, warnings)), filled, digest, scales.about)


def _look_up(scales: InputScales, bridge: Bridge, member: str) -> float | None:
    """Return a module's scale, its own or its expert stack's, or None if nothing is written for it."""
    values = [scales.global_scales[name] for name in bridge.names(member)]
    return next((value for value in values if is_calibrated(value)), values[0] if values else None)


def _disagreements(values: Mapping[str, Sequence[float]]) -> str:
    ratios = {name: max(each) / min(each) for name, each in values.items() if each and min(each) != max(each)}
    if not ratios:
        return ""
    groups = counted(len(ratios), "fused group", "fused groups")
    return (
        f"input scales disagree inside {groups}, by up to {max(ratios.values()):.3g} times: "
        f"the smallest input_global_scale of each holds for all its members: {listed(ratios)}"
    )


def _partners(names: Collection[str]) -> str:
    words = "module has no scale of its own and takes", "modules have no scale of their own and take"
    return f"{counted(len(names), *words)} that of the layers fused with it: {listed(names)}" if names else ""


def _ignored(names: Collection[str]) -> str:
    words = "input scale of a module that is kept is ignored", "input scales of modules that are kept are ignored"
    return f"{counted(len(names), *words)}: {listed(names)}" if names else ""
