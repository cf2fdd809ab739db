"""Say of each weight what it becomes, by which method, and with which input scale.

Called by `building`. Pure: everything follows from the selection, the method asked for, and what the calibration file holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.weights import Weight
from ..encodings.fp4 import Nvfp4
from ..errors import RuleError, UsageError, quote
from ..names.fusion import FusedGroup
from ..scales.assignment import AssignedScales, assign_input_scales
from ..scales.input_scales import InputScales
from ..scales.uncalibrated import UncalibratedInputs, resolved
from .carried import Carried, carried_weights
from .format_choice import WITHOUT_INPUTS
from .formats import FORMATS, TargetFormat
from .jobs import CAST
from .method_choice import WeightTarget, weight_target
from .rules import Selection
from .stored_codes import takes_codes

if TYPE_CHECKING:
    from ..calibration.reading import Calibration
    from ..checkpoint.source import Source


class ChosenTargets(NamedTuple):
    """What becomes of all quantized modules: those carried over, the other `weights`, and what these take from elsewhere."""

    formats: Mapping[str, TargetFormat]
    carried: Carried
    weights: Mapping[str, Weight]
    calibration: Calibration | None
    input_scales: AssignedScales | None
    cast: frozenset[str] = frozenset()


def choose_targets(
    source: Source,
    selection: Selection,
    scales: InputScales | UncalibratedInputs | None,
    calibration: Calibration | None,
    *,
    casts: bool = False,
) -> ChosenTargets:
    """Return what becomes of the modules that were selected; reads scales of what is NVFP4 in the source already.

    What is stored in the codes of its format goes over as it is: FP8 always, MXFP4 that becomes NVFP4 with `casts`.
    """
    _refuse_other_formats(selection)
    chosen = {w.module: w for item in selection.tensors if item.decision.quantize for w in item.candidate.weights}
    with_input = {module for module, target in formats_of(selection).items() if target.needs_input_scales}
    carried = carried_weights(source, chosen.values(), selection.groups, with_input=with_input)
    formats = _with_known_inputs(selection, carried, given=scales is not None)
    weights = {module: weight for module, weight in chosen.items() if module not in carried.weights}
    kept = [*_kept_names(selection), *carried.weights]
    if calibration is not None:
        calibration = _statistics_of(calibration, weights, formats, kept)
    groups = [group for group in selection.groups if group.members[0] not in carried.weights]
    cast = frozenset(_cast(groups, weights, formats, casts=casts))
    return ChosenTargets(formats, carried, weights, calibration, _assign(scales, groups, formats, kept), cast)


def _cast(
    groups: Iterable[FusedGroup], weights: Mapping[str, Weight], formats: Mapping[str, TargetFormat], *, casts: bool
) -> Iterator[str]:
    """Yield the modules whose codes go over: where a fused group shares a scale, that of all its members."""
    for group in groups:
        found = [each for each in group.members if takes_codes(formats[each], weights[each])]
        if not formats[group.members[0]].by_group or (casts and len(found) == len(group.members)):
            yield from found


def formats_of(selection: Selection) -> dict[str, TargetFormat]:
    """Return each quantized module's format."""
    return {
        weight.module: FORMATS[item.decision.format]
        for item in selection.tensors
        if item.decision.quantize
        for weight in item.candidate.weights
    }


def _kept_names(selection: Selection) -> Iterator[str]:
    """Yield the modules that stay as they are, the parts of kept stacks included."""
    for item in selection.tensors:
        if not item.decision.quantize:
            yield item.candidate.module
            yield from (weight.module for weight in item.candidate.weights)


def _statistics_of(
    calibration: Calibration, weights: Mapping[str, Weight], formats: Mapping[str, TargetFormat], kept: Sequence[str]
) -> Calibration:
    """Return the calibration file as the source names its modules; only some formats need what it holds."""
    columns = {name: weight.columns for name, weight in weights.items() if formats[name].takes_statistics}
    return calibration.of_model(columns, [*kept, *(name for name in weights if name not in columns)])


def _with_known_inputs(selection: Selection, carried: Carried, *, given: bool) -> dict[str, TargetFormat]:
    """Return each quantized module's format, without inputs where they have no scale and nobody asked for one.

    What is NVFP4 in the source has the scales that it has there; `given` says whether there are any for the rest.
    """
    found = formats_of(selection)
    for item in selection.tensors:
        for weight in item.candidate.weights if item.decision.quantize else ():
            target, own = found[weight.module], carried.weights.get(weight.module)
            without = WITHOUT_INPUTS.get(target.name)
            known = given or item.decision.is_asked if own is None else own.input_scale is not None
            if without is not None and not known:
                found[weight.module] = FORMATS[without]
    return found


def _refuse_other_formats(selection: Selection) -> None:
    """Raise RuleError where another format is asked for than what a weight has in the source, from which it is copied."""
    for item in selection.tensors:
        for weight in item.candidate.weights if item.decision.quantize else ():
            if isinstance(weight.encoding, Nvfp4) and FORMATS[item.decision.format].family != "nvfp4":
                raise RuleError(
                    f"{quote(weight.module)} cannot be {item.decision.format}: it is NVFP4 in the source, which goes over "
                    f"as it is; convert the original checkpoint"
                )


def _assign(
    scales: InputScales | UncalibratedInputs | None,
    groups: Sequence[FusedGroup],
    formats: Mapping[str, TargetFormat],
    kept: Sequence[str],
) -> AssignedScales | None:
    """Return the input scales of those of the groups whose format needs one; None where none does."""
    needed = [group for group in groups if formats[group.members[0]].needs_input_scales]
    if not needed:
        return None
    given = resolved(scales, needed)
    if given is None:
        target = formats[needed[0].members[0]]
        raise UsageError(
            f"format {target.name} of {quote(needed[0].name)} needs input scales, from input_scales, calibration or like"
        )
    others = [module for module, target in formats.items() if not target.needs_input_scales]
    return assign_input_scales(given, needed, kept=[*kept, *others])


def target_of_weight(found: ChosenTargets, method: str, weight: Weight) -> WeightTarget:
    """Return what one of the modules that were chosen becomes."""
    if weight.module in found.cast:
        return WeightTarget(found.formats[weight.module], CAST)
    return weight_target(weight, found.formats[weight.module], method, found.calibration)
