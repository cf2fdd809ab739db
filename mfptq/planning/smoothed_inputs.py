"""Put smoothing into a plan: the source as it is to be read, and what its calibration file says then.

Called by `building` before formats and scales are assigned, so that nothing behind it needs to know of factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.weights import candidates
from ..encodings.fp4 import Nvfp4
from ..names.config_sizes import read_sizes
from ..scales.input_scales import InputScales
from ..scales.uncalibrated import UncalibratedInputs
from .formats import FORMATS
from .rules import Selection, TensorDecision
from .settings import Settings, input_margin

if TYPE_CHECKING:
    from ..calibration.reading import Calibration
    from ..encodings.contents import Contents
    from ..smoothing.plan import Smoothing


class Inputs(NamedTuple):
    """What a plan is made of: the source's tensors, what becomes of them, and what is known of their inputs."""

    contents: Contents
    selection: Selection
    calibration: Calibration | None
    scales: InputScales | UncalibratedInputs | None
    smoothing: Smoothing | None = None


def smoothed_inputs(given: Inputs, config: Mapping[str, Any], settings: Settings) -> Inputs:
    """Return everything with the inputs smoothed that can be, if that is asked for; `config` is the source's config.json."""
    if not settings.smooth or given.calibration is None:
        return given
    from ..smoothing.plan import find_smoothing
    from ..smoothing.structure import find_links

    quantized: dict[str, int] = {}
    fixed: set[str] = set()
    for item in given.selection.tensors:
        target = FORMATS[item.decision.format] if item.decision.quantize else None
        if target is not None and target.takes_statistics and not isinstance(item.candidate.tensor.encoding, Nvfp4):
            quantized.update((weight.module, weight.columns) for weight in item.candidate.weights)
        elif target is not None and target.needs_input_scales:
            fixed.update(weight.module for weight in item.candidate.weights)
    modules = [weight.module for item in given.selection.tensors for weight in item.candidate.weights]
    kept = [each for each in (*modules, *_tensors_alone(given.selection)) if each not in quantized]
    smoothing = find_smoothing(
        find_links({each.info.name: each for each in given.contents}, config, given.selection.structure.outside),
        {item.candidate.tensor.info.name: item.candidate for item in given.selection.tensors},
        quantized,
        given.calibration.of_model(quantized, kept),
        fixed=fixed,
    )
    calibration = given.calibration.smoothed(smoothing.inputs)
    scales = given.scales and calibration.input_scales(input_margin(settings, calibration.description.origin))
    contents = given.contents.mapped(smoothing.of)
    return Inputs(contents, _reread(given.selection, contents, config), calibration, scales, smoothing)


def _tensors_alone(selection: Selection) -> list[str]:
    return [item.candidate.module for item in selection.tensors if not item.decision.quantize]


def _reread(selection: Selection, contents: Contents, config: Mapping[str, Any]) -> Selection:
    """Return the same decisions for the tensors as they are to be read."""
    found = {item.tensor.info.name: item for item in candidates(contents, read_sizes(config))}
    tensors = tuple(TensorDecision(found[item.candidate.tensor.info.name], item.decision) for item in selection.tensors)
    return replace(selection, tensors=tensors)
