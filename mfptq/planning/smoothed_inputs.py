"""Smooth the inputs of a plan: return the source's tensors as they are to be read, and the calibration file for those.

Called by `building` before input scales are assigned, so that no later stage needs to know of factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.weights import candidates
from ..encodings.fp4 import Nvfp4
from ..scales.uncalibrated import InputScaleSource
from .formats import FORMATS
from .kept_codes import with_kept_codes
from .rules import Selection, TensorDecision
from .settings import Settings, input_margin
from .stored_codes import takes_codes

if TYPE_CHECKING:
    from ..calibration.reading import Calibration
    from ..encodings.contents import Contents
    from ..smoothing.plan import Outcomes, Smoothing


class Inputs(NamedTuple):
    """What a plan is made of: the source's tensors, what becomes of them, and what is known of their inputs."""

    contents: Contents
    selection: Selection
    calibration: Calibration | None
    scales: InputScaleSource | None
    smoothing: Smoothing | None = None


def smoothed_inputs(given: Inputs, config: Mapping[str, Any], settings: Settings) -> Inputs:
    """Return everything with the inputs smoothed that can be, where that is due; `config` is the source's config.json."""
    calibration = given.calibration
    if calibration is None or not _is_due(given, calibration, settings):
        return given
    from ..smoothing.plan import find_smoothing  # here, since most plans smooth nothing
    from ..smoothing.structure import find_links

    outcomes = _outcomes(given.selection, casts=settings.is_auto)
    modules = [weight.module for item in given.selection.tensors for weight in item.candidate.weights]
    modules += [item.candidate.module for item in given.selection.tensors if not item.decision.quantize]
    kept = [module for module in modules if module not in outcomes.quantized]
    smoothing = find_smoothing(
        find_links({each.info.name: each for each in given.contents}, config, given.selection.structure.outside),
        {item.candidate.tensor.info.name: item.candidate for item in given.selection.tensors},
        outcomes,
        calibration.of_model(outcomes.quantized, kept),
        strict=settings.smooth is True,
    )
    calibration = calibration.smoothed(smoothing.inputs)
    scales = given.scales and calibration.input_scales(input_margin(settings, calibration.description.origin))
    contents = given.contents.mapped(smoothing.of)
    return Inputs(contents, _reread(given.selection, contents), calibration, scales, smoothing)


def _is_due(given: Inputs, calibration: Calibration, settings: Settings) -> bool:
    """Return whether to smooth: as asked; else in W4A4, if the method is left open too and the file has second moments."""
    if settings.smooth is not None:
        return settings.smooth
    return given.scales is not None and settings.is_auto and calibration.description.has_moments


def _outcomes(selection: Selection, *, casts: bool) -> Outcomes:
    from ..smoothing.plan import Outcomes  # as above

    outcomes = Outcomes({}, set(), set(), set())
    for item in with_kept_codes(selection).tensors:
        weights = item.candidate.weights
        target = FORMATS[item.decision.format] if item.decision.quantize else None
        if target is None or isinstance(item.candidate.tensor.encoding, Nvfp4):
            continue
        modules = [weight.module for weight in weights]
        if target.takes_statistics:
            outcomes.quantized.update(zip(modules, (weight.columns for weight in weights), strict=True))
            outcomes.rounded.update(modules if target.needs_input_scales else ())
        elif target.needs_input_scales:
            outcomes.fixed.update(modules)
        if all(takes_codes(target, weight) for weight in weights) and (casts or not target.takes_statistics):
            outcomes.as_they_are.add(item.candidate.tensor.info.name)
    return outcomes


def _reread(selection: Selection, contents: Contents) -> Selection:
    """Return the same decisions for the tensors as they are to be read."""
    found = {item.tensor.info.name: item for item in candidates(contents, selection.structure.sizes)}
    tensors = tuple(TensorDecision(found[item.candidate.tensor.info.name], item.decision) for item in selection.tensors)
    return replace(selection, tensors=tensors)
