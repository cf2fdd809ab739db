"""Plan every output file exactly: header, size and steps, from the source's headers alone.

Called by `planner.make_plan`, and by calibration for the layers that would be quantized. Reads no weight and writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from ..checkpoint.folder import Checkpoint
from ..checkpoint.header import TensorSpec
from ..checkpoint.weights import candidates
from ..encodings.contents import read_contents
from ..names.adapters import check_merged
from ..names.config_sizes import read_sizes
from ..scales.uncalibrated import InputScaleSource
from ..storage.digest import text_sha256
from .cache_scales import cache_scales
from .carried import has_input_scales
from .format_choice import select_formats
from .formats import FORMATS
from .jobs import ShardPlan, plan_shard
from .kept_codes import with_kept_codes
from .output_order import output_specs
from .plan import ConversionPlan
from .quantization_config import config_text, index_text, quantization
from .settings import Settings
from .smoothed_inputs import Inputs, smoothed_inputs
from .weight_targets import ChosenTargets, choose_targets, weight_runs

if TYPE_CHECKING:
    from ..calibration.reading import Calibration
    from ..smoothing.plan import Smoothing

PLAN_FORMAT = 7  # of the bytes that a plan stands for: another number where they change by themselves


def build_plan(
    checkpoint: Checkpoint,
    settings: Settings,
    scales: InputScaleSource | None = None,
    calibration: Calibration | None = None,
) -> ConversionPlan:
    """Return the plan of a conversion; reads nothing but what is held already, and norms for uncalibrated scales.

    Raises SourceError, RuleError, ScaleError for whatever would stop the conversion later.
    """
    stored = read_contents(checkpoint)
    with_input = scales is not None or (has_input_scales(stored) and settings.scheme != "NVFP4A16")
    scheme = settings.resolve_scheme(with_input=with_input)
    method = settings.resolve_method(calibrated=calibration is not None)
    sizes = read_sizes(checkpoint.config)
    check_merged([tensor.info.name for tensor in checkpoint.tensors()], sizes.adapters)
    tensors = tuple(candidates(stored, sizes))
    selection = select_formats(tensors, checkpoint.config, settings, FORMATS[scheme.lower()])
    given = smoothed_inputs(Inputs(stored, selection, calibration, scales), checkpoint.config, settings)
    contents, selection = given.contents, with_kept_codes(given.selection)
    found = choose_targets(checkpoint.source, selection, given.scales, given.calibration, casts=settings.is_auto)
    group_of = {member: group for group in selection.groups for member in group.members}
    cache = cache_scales(contents, settings, calibration, given.smoothing, source=checkpoint.source)
    targets = found.targets(method)
    runs = weight_runs(selection, targets)
    specs = partial(output_specs, runs=runs, group_of=group_of)
    shards, index = _lay_out(contents.kept_shards, lambda name: [*specs(contents.shards[name]), *cache.specs(name)])
    config = config_text(checkpoint.config, quantization(selection, settings.rules, found.formats, settings.kv_cache))
    return ConversionPlan(
        *(checkpoint, contents, settings, scheme, selection, method, found.calibration),
        input_scales=found.input_scales,
        carried=found.carried,
        smoothing=given.smoothing,
        shards=shards,
        config_text=config,
        index_text=index if checkpoint.has_index else None,
        digests=_digests(checkpoint, (method, config), found, given.smoothing) | contents.digests | cache.digests,
        cache_scales=cache,
        _weights=found.weights,
        _group_of=group_of,
        _runs=runs,
        _targets=targets,
    )


def _digests(
    checkpoint: Checkpoint, decided: tuple[str, str], found: ChosenTargets, smoothing: Smoothing | None
) -> dict[str, str]:
    """Return what the output depends on by name, so that a resumed run can say what changed.

    Plans with equal digests make the same bytes. `decided` is the method and the text of config.json.
    """
    source, scales = [(each.name, each.size, each.digest) for each in checkpoint.shards], found.input_scales
    return {
        "format": str(PLAN_FORMAT),
        "source": text_sha256(json.dumps(source)),
        **({} if checkpoint.origin.revision is None else {"commit": checkpoint.origin.revision}),
        "settings": text_sha256(json.dumps(decided)),
        "input scales": scales.digest if scales is not None else "",
        **({} if found.calibration is None else {"calibration": found.calibration.digest}),
        **found.carried.digests,
        **({"cast": text_sha256("\n".join(sorted(found.cast)))} if found.cast else {}),
        **({"smoothing": smoothing.digest} if smoothing is not None and smoothing.powers else {}),
    }


def _lay_out(names: Iterable[str], specs: Callable[[str], list[TensorSpec]]) -> tuple[tuple[ShardPlan, ...], str]:
    """Return the output's shards, one for each of the source's, and the index over them."""
    places: dict[str, str] = {}
    shards = tuple(plan_shard(name, specs(name), places) for name in names)
    return shards, index_text(sum(shard.tensor_bytes for shard in shards), places)
