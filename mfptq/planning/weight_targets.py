"""Choose what each quantized weight becomes, by which method, and with which input scale.

Called by `building`; `weight_target` also by what tries other formats. Reads scales of what is NVFP4 in the source, and norms
for uncalibrated scales; never a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.header import tensor_bytes
from ..checkpoint.weights import Weight
from ..encodings.fp4 import Nvfp4
from ..errors import RuleError, UsageError, quote
from ..names.fusion import FusedGroup
from ..scales.assignment import AssignedScales, assign_input_scales
from ..scales.uncalibrated import InputScaleSource, UncalibratedInputs
from .carried import Carried, carried_weights
from .format_choice import WITHOUT_INPUTS
from .formats import FORMATS, OutputTensor, TargetFormat
from .jobs import CAST
from .rules import Selection
from .stored_codes import takes_codes

if TYPE_CHECKING:
    from ..calibration.reading import Calibration
    from ..checkpoint.source import Source


class WeightTarget(NamedTuple):
    """What a weight becomes: its format, and the method, which decides the dtype of some scales."""

    format: TargetFormat
    method: str


class WeightRun(NamedTuple):
    """Weights that follow each other in one source tensor and become the same: mostly all experts of a stack."""

    target: WeightTarget
    weights: tuple[Weight, ...]

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """What each of the weights becomes."""
        return tuple(self.target.format.tensors(self.weights[0], self.target.method))

    @property
    def weight_bytes(self) -> int:
        """Size of all tensors that one of the weights becomes, in bytes."""
        return sum(tensor_bytes(each.dtype, each.shape) or 0 for each in self.tensors)


class ChosenTargets(NamedTuple):
    """What becomes of all quantized modules: those carried over, the other `weights`, and what these take from elsewhere."""

    formats: Mapping[str, TargetFormat]
    carried: Carried
    weights: Mapping[str, Weight]
    calibration: Calibration | None
    input_scales: AssignedScales | None
    cast: frozenset[str] = frozenset()

    def targets(self, method: str) -> dict[str, WeightTarget]:
        """Return what each quantized module becomes, if `method` is what the user asked for."""
        found = {
            module: weight_target(module, target, method, self.calibration) for module, target in self.formats.items()
        }
        return found | {module: WeightTarget(self.formats[module], CAST) for module in self.cast}


def weight_target(module: str, target: TargetFormat, method: str, calibration: Calibration | None) -> WeightTarget:
    """Return what a weight becomes, and by which method: the one asked for, or what format and calibration file allow."""
    if not target.takes_statistics:
        return WeightTarget(target, "minmax" if method == "minmax" else "search")
    return WeightTarget(target, method if calibration is None else calibration.method(module, method))


def weight_runs(selection: Selection, targets: Mapping[str, WeightTarget]) -> dict[str, tuple[WeightRun, ...]]:
    """Return the weights of each source tensor that is quantized, by its name, with what they become."""
    return {
        item.candidate.tensor.info.name: tuple(
            WeightRun(target, tuple(weights))
            for target, weights in groupby(item.candidate.weights, key=lambda weight: targets[weight.module])
        )
        for item in selection.tensors
        if item.decision.quantize
    }


def choose_targets(
    source: Source,
    selection: Selection,
    scales: InputScaleSource | None,
    calibration: Calibration | None,
    *,
    casts: bool,
) -> ChosenTargets:
    """Return what becomes of the modules that were selected; reads scales of what is NVFP4 in the source already.

    What is stored in the codes of its format goes over as it is: FP8 always, MXFP4 that becomes NVFP4 with `casts`.
    """
    carried = _carried(source, selection)
    formats = _formats(selection, carried, given=scales is not None)
    weights = {weight.module: weight for _, weight in selection.quantized() if not isinstance(weight.encoding, Nvfp4)}
    kept = [*_kept_names(selection), *carried.weights]
    if calibration is not None:
        calibration = _statistics_of(calibration, weights, formats, kept)
    groups = [group for group in selection.groups if group.members[0] in weights]
    is_plain = all(item.candidate.tensor.encoding is None for item in selection.tensors)
    cast = frozenset(() if is_plain else _cast(groups, weights, formats, casts=casts))
    return ChosenTargets(formats, carried, weights, calibration, _assign(scales, groups, formats, kept), cast)


def _cast(
    groups: Iterable[FusedGroup], weights: Mapping[str, Weight], formats: Mapping[str, TargetFormat], *, casts: bool
) -> Iterator[str]:
    """Yield the modules whose codes go over: where a fused group shares a scale, that of all its members."""
    for group in groups:
        found = [each for each in group.members if takes_codes(formats[each], weights[each])]
        if not formats[group.members[0]].by_group or (casts and len(found) == len(group.members)):
            yield from found


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


def _carried(source: Source, selection: Selection) -> Carried:
    """Return what goes over as it is; raises RuleError where another format is asked for than it has in the source."""
    weights: dict[str, Nvfp4] = {}
    with_input: set[str] = set()
    for item, weight in selection.quantized():
        if not isinstance(weight.encoding, Nvfp4):
            continue
        target = FORMATS[item.decision.format]
        if target.family != "nvfp4":
            raise RuleError(
                f"{quote(weight.module)} cannot be {target.name}: it is NVFP4 in the source, which goes over as it is; "
                f"convert the original checkpoint"
            )
        weights[weight.module] = weight.encoding
        if target.needs_input_scales:
            with_input.add(weight.module)
    return carried_weights(source, weights, selection.groups, with_input=with_input)


def _formats(selection: Selection, carried: Carried, *, given: bool) -> dict[str, TargetFormat]:
    """Return each quantized module's format, without inputs where they have no scale and nobody asked for one.

    What is NVFP4 in the source has the scales that it has there; `given` says whether there are any for the rest.
    """
    found: dict[str, TargetFormat] = {}
    for item in selection.tensors:
        if not item.decision.quantize:
            continue
        target = FORMATS[item.decision.format]
        without = FORMATS.get(WITHOUT_INPUTS.get(target.name, ""), target)
        known = given or item.decision.is_format_asked
        for weight in item.candidate.weights:
            own = carried.weights.get(weight.module)
            has_scale = known if own is None else own.input_scale is not None
            found[weight.module] = target if has_scale else without
    return found


def _assign(
    scales: InputScaleSource | None,
    groups: Sequence[FusedGroup],
    formats: Mapping[str, TargetFormat],
    kept: Sequence[str],
) -> AssignedScales | None:
    """Return the input scales of those of the groups whose format needs one; None where none does."""
    needed = [group for group in groups if formats[group.members[0]].needs_input_scales]
    if not needed:
        return None
    if isinstance(scales, UncalibratedInputs):
        scales = scales.of(needed)
    if scales is None:
        target = formats[needed[0].members[0]]
        raise UsageError(
            f"format {target.name} of {quote(needed[0].name)} needs input scales, from input_scales, calibration or like"
        )
    others = [module for module, target in formats.items() if not target.needs_input_scales]
    return assign_input_scales(scales, needed, kept=[*kept, *others])
