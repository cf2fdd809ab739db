"""Turn a target for the output's size into a format for each layer.

Called by `planner.make_plan` with the plan that the other decisions lead to. Errors of formats are taken from a file where
it has them, else found by one pass over the weights and kept there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.strict_json import StrictJsonError, dump_json, parse_json
from ..errors import MfptqError, UsageError
from ..planning.allocation import Allocation, allocate
from ..planning.formats import KEEP, FormatRule
from ..planning.plan import ConversionPlan
from ..planning.settings import Settings
from ..planning.size_target import SizeTarget
from ..planning.size_units import Errors, Layers, basis, changeable_layers, unit_of
from ..storage.files import expanded, read_small, storage_errors
from ..storage.partial_file import PartialFile, partial_path
from .format_errors import measure_errors
from .prepare import Measuring

ERRORS_FORMAT = 1
MAX_FILE_BYTES = 2**28
HEADER_SPARES = (4096, 1024, 256, 0)  # by how many bytes headers may get shorter where layers have fewer tensors


def aimed(plan: ConversionPlan, measuring: Measuring, rebuild: Callable[[Settings], ConversionPlan]) -> ConversionPlan:
    """Return the plan in which layers have the formats that the target of its settings asks for.

    `rebuild` returns the plan of other settings. Raises UsageError for a target that is too small.
    """
    target = plan.settings.target
    assert target is not None
    layers = changeable_layers(plan)
    errors = _errors(plan, layers, target, measuring)
    allocation = _allocation(plan, target, layers, errors)
    if not allocation.fixed and all(each.format == KEEP for each in allocation.chosen.values()):
        raise UsageError(f"a target of {target} leaves nothing to quantize: the source is no larger")
    made = rebuild(replace(plan.settings, chosen=_rules(allocation, target)))
    if target.nbytes is not None and made.output_bytes < target.nbytes:
        made, allocation = _closer(made, allocation, target, rebuild)
    others = made.output_bytes - allocation.fixed - allocation.size
    return replace(made, allocation=replace(allocation, others=others))


def _closer(
    made: ConversionPlan, allocation: Allocation, target: SizeTarget, rebuild: Callable[[Settings], ConversionPlan]
) -> tuple[ConversionPlan, Allocation]:
    """Return what a choice gives that counts on shorter headers, the largest that fits; the first where none does."""
    assert target.nbytes is not None
    left = allocation.size + target.nbytes - made.output_bytes
    for spare in HEADER_SPARES:
        again = replace(allocation, chosen=allocate(allocation.units, left + spare))
        if again.chosen != allocation.chosen:
            other = rebuild(replace(made.settings, chosen=_rules(again, target)))
            if other.output_bytes <= target.nbytes:
                return other, again
    return made, allocation


def _allocation(plan: ConversionPlan, target: SizeTarget, layers: Sequence[Layers], errors: Errors) -> Allocation:
    units = tuple(unit_of(plan, each, target.formats, errors) for each in layers)
    changeable = {item.tensor.info.name for each in layers for item in each.items}
    rest = [
        run
        for item in plan.selection.tensors
        if item.candidate.tensor.info.name not in changeable
        for run in plan.runs_of(item)
    ]
    fixed = sum(run.weight_bytes * len(run.weights) for run in rest)
    elements = sum(weight.size for run in rest for weight in run.weights)
    others = plan.output_bytes - fixed - sum(unit.options[0].nbytes for unit in units)
    if target.bits is not None:
        budget = int(target.bits * (elements + sum(unit.elements for unit in units)) / 8) - fixed
    else:  # headers only get shorter where layers have fewer tensors
        budget = (target.nbytes or 0) - fixed - others
    return Allocation(str(target), basis(plan), units, allocate(units, budget), fixed, elements, others)


def _rules(allocation: Allocation, target: SizeTarget) -> tuple[FormatRule, ...]:
    """Return the rules that give each unit its format; those that keep the first need none."""
    return tuple(
        FormatRule(chosen.format, module, f"{chosen.format} for {target}")
        for unit in allocation.units
        if (chosen := allocation.chosen[unit.name]).format != unit.options[0].format
        for module in unit.modules
    )


def _errors(plan: ConversionPlan, layers: Sequence[Layers], target: SizeTarget, measuring: Measuring) -> Errors:
    """Return the errors of each group, from the file if they are those of this very plan."""
    key = _key(plan, layers, target)
    path = None if measuring.path is None else expanded(measuring.path)
    known = None if path is None else _read(path, key)
    if known is not None:
        return known
    found = measure_errors(plan, layers, target.formats, measuring)
    if path is not None:
        _write(path, {"format": ERRORS_FORMAT, "key": key, "errors": found})
    return found


def _key(plan: ConversionPlan, layers: Sequence[Layers], target: SizeTarget) -> str:
    """Return what the errors depend on, as a SHA-256, hexadecimal."""
    shards = [(each.name, each.size, each.digest) for each in plan.checkpoint.shards]
    bases = [(each.name, plan.format_of(each.weights[0]).name) for each in layers]
    calibration = plan.digests.get("calibration", "")
    parts = [ERRORS_FORMAT, shards, plan.method, calibration, bases, target.formats]
    parts += [plan.digests["smoothing"]] if "smoothing" in plan.digests else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(path: Path, key: str) -> Errors | None:
    """Return the errors that a file holds for this key; None where it is missing, damaged, or of something else."""
    if not path.is_file():
        return None
    try:
        found: Any = parse_json(read_small(path, MAX_FILE_BYTES))
    except (MfptqError, StrictJsonError):
        return None
    if not isinstance(found, dict) or found.get("key") != key or not isinstance(found.get("errors"), dict):
        return None
    errors: Errors = found["errors"]
    return errors


def _write(path: Path, contents: Mapping[str, Any]) -> None:
    data = dump_json(contents).encode()
    with storage_errors("write", path):
        file = PartialFile(partial_path(path.parent, path.name), path, len(data))
        try:
            file.write(data, 0)
            file.commit()
        finally:
            file.discard()
