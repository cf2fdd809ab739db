"""Open a source and the files that decisions name, and plan what becomes of it.

Called by `conversion`, the commands and each task of a cluster. Writes nothing; a target for the size has the weights read once.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .checkpoint.companions import FileChoice
from .execution.prepare import Measuring
from .hub.opening import HubOptions, open_checkpoint
from .planning.building import build_plan
from .planning.plan import ConversionPlan
from .planning.settings import Decisions, Settings, check_decisions, input_margin
from .scales.input_scales import AUTO, InputScales
from .scales.reading import read_input_scales
from .scales.uncalibrated import UncalibratedInputs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .calibration.reading import Calibration


class _Known(NamedTuple):
    """The settings, and what is known of inputs, once the files that decisions name are read."""

    settings: Settings
    scales: InputScales | None = None
    calibration: Calibration | None = None


def make_plan(source: str | Path, measuring: Measuring | None = None, **decisions: Unpack[Decisions]) -> ConversionPlan:
    """Return the plan with everything that the later stages need; `mfptq.plan` wraps it for the public.

    `measuring` is what the pass over the weights may use that a target for the size takes.
    """
    asked = check_decisions(decisions)
    keep = decisions.get("keep_source", False)
    hub = HubOptions(decisions.get("revision"), decisions.get("token"), decisions.get("cache_dir"), keep)
    included, skipped = tuple(decisions.get("include_files", ())), tuple(decisions.get("skip_files", ()))
    choice = FileChoice(included, skipped, follow_links=decisions.get("follow_links", False))
    with ExitStack() as opened:
        settings, scales, calibration = _read_named(asked, decisions, hub, opened)
        checkpoint = open_checkpoint(source, hub, choice)
        opened.callback(checkpoint.source.close)
        if scales is not None:
            scales.check_smoothing(checkpoint.source)
        found = UncalibratedInputs(checkpoint) if decisions.get("input_scales") == AUTO else scales
        made = build_plan(checkpoint, settings, found, calibration)
        if settings.target is not None and settings.chosen is None:
            from .execution.size_target import aimed

            aim = measuring or Measuring(path=decisions.get("format_errors"))
            made = aimed(made, aim, lambda changed: build_plan(checkpoint, changed, found, calibration))
        opened.pop_all()
    return made


def _read_named(settings: Settings, decisions: Decisions, hub: HubOptions, opened: ExitStack) -> _Known:
    """Return what the one source of input scales tells: `input_scales`, `like` or `calibration`, or none of them."""
    weight_only = settings.scheme == "NVFP4A16"  # then the rest of what `like` or `calibration` tells is of use
    if (given := decisions.get("input_scales")) is not None:
        if given == AUTO or isinstance(given, InputScales):
            return _Known(settings, given if isinstance(given, InputScales) else None)
        return _Known(settings, read_input_scales(given, token=hub.token, cache_dir=hub.cache_dir))
    if (like := decisions.get("like")) is not None:
        from .scales.sibling import read_sibling

        sibling = read_sibling(like, token=hub.token, cache_dir=hub.cache_dir)
        settings = replace(settings, rules=replace(settings.rules, like=sibling))
        return _Known(settings, None if weight_only else sibling.scales)
    if (calibrated := decisions.get("calibration")) is not None:
        from .calibration.reading import load_calibration

        calibration = load_calibration(calibrated)
        opened.callback(calibration.close)
        scales = calibration.input_scales(input_margin(settings, calibration.description.origin))
        return _Known(settings, None if weight_only else scales, calibration)
    return _Known(settings)
