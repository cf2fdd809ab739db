"""Write config.json and the index as text: what an engine reads to understand the tensors.

Called by `building`, and by `tensors` for pipelines of one's own. The keys are those that compressed-tensors 0.20 writes and
that 0.17 and later accept; unknown keys inside `weights` or `input_activations` would be refused by the versions that vLLM and
SGLang pin.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from json.encoder import encode_basestring
from typing import Any, Literal

from ..checkpoint.strict_json import dump_json
from ..checkpoint.weights import name_pattern
from ..encodings.declared import MAX_CONFIG_DEPTH, QUANTIZATION_KEYS
from ..names.engine import EXPERTS
from ..names.leaves import kept_by, leaf_of
from ..names.wrappers import logical
from .config_groups import LINEAR, config_group, config_groups, quantized_layers, top_level_format
from .format_choice import WITHOUT_INPUTS
from .formats import FORMATS, KV_CACHE_SCHEMES, QUANTIZATION_CONFIG, TargetFormat
from .ignored import ignore_list
from .rules import Rules, Selection

COMPRESSED_TENSORS = "0.20.0"
_STORED_AS = ("expert_dtype", "moe_quant_algo")
_DTYPE_KEYS = ("dtype", "torch_dtype")

Scheme = Literal["NVFP4", "NVFP4A16"]


def quantization_config(scheme: Scheme, ignore: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint whose every linear layer is NVFP4, but for those ignored.

    `NVFP4A16` leaves activations as they are.
    """
    target = FORMATS[scheme.lower()]
    return _config({"group_0": config_group(target, [LINEAR])}, target.stored_as, ignore)


def _config(
    groups: Mapping[str, Any], top_level: str, ignore: Iterable[str], kv_cache: str | None = None
) -> dict[str, Any]:
    return {
        "config_groups": dict(groups),
        "format": top_level,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": dict(KV_CACHE_SCHEMES[kv_cache]) if kv_cache is not None else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": COMPRESSED_TENSORS,
    }


def quantization(
    selection: Selection, rules: Rules, formats: Mapping[str, TargetFormat], kv_cache: str | None = None
) -> dict[str, Any]:
    """Return the `quantization_config` of what was selected; `formats` are those of the quantized modules.

    Where there is one format, all layers that are not ignored have it; so it is where some only lack the input scale of the
    others, which are named: engines ask for names before classes. Where there are several, all layers are named.
    """
    found = list(dict.fromkeys(formats.values()))
    lacking = _lacking(selection, formats)
    others = (
        list(dict.fromkeys(target for name, target in formats.items() if name not in lacking)) if lacking else found
    )
    without = {formats[name].name for name in lacking}
    if len(found) == 1:
        groups = {"group_0": _of_all_others(found[0], formats)}
    elif len(others) == 1 and without == {WITHOUT_INPUTS.get(others[0].name)}:
        alone = [group for group in selection.groups if group.members[0] in lacking]
        names = sorted({name for group in alone for name in (group.name, *group.members)})
        named = config_group(formats[alone[0].members[0]], names)
        groups = {"group_0": _of_all_others(others[0], formats), "group_1": named}
    else:
        groups = config_groups(quantized_layers(selection.groups, formats))
    return _config(groups, top_level_format(found), ignore_list(selection, rules), kv_cache)


def _of_all_others(target: TargetFormat, modules: Iterable[str]) -> dict[str, Any]:
    """Return the config group of all layers that are neither ignored nor named by another group."""
    return config_group(target, [LINEAR, *head_targets(modules)])


def _lacking(selection: Selection, formats: Mapping[str, TargetFormat]) -> frozenset[str]:
    """Return the modules that were to have the format of the others, and lack the input scale that it needs."""
    return frozenset(
        weight.module
        for item, weight in selection.quantized()
        if item.decision.format in WITHOUT_INPUTS and formats[weight.module].name != item.decision.format
    )


def head_targets(modules: Iterable[str]) -> list[str]:
    """Return patterns for those of the quantized modules that engines do not build as linear layers: output heads."""
    outside = (name for name in modules if f".{EXPERTS}." not in name)  # heads are no experts, of which there are many
    names = {name_pattern(logical(name), "0") for name in outside}
    heads = {leaf_of(name) for name in names if any(line.role == "head" for line in kept_by(name))}
    return [rf"re:(.*\.)?{re.escape(leaf)}$" for leaf in sorted(heads)]


def config_text(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> str:
    """Return config.json: the source's keys in their order, then the quantization; the source's own are dropped, at any depth.

    So is what else tells how a quantized source was stored: DeepSeek-V4's dtypes of experts, and a dtype of eight bits.
    """
    plain = {
        key: value for key, value in _without_quantization(config, MAX_CONFIG_DEPTH).items() if key not in _STORED_AS
    }
    return dump_json({**plain, QUANTIZATION_CONFIG: quantization})


def _without_quantization(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in QUANTIZATION_KEYS:
            continue
        nested = isinstance(value, dict) and depth > 0
        result[key] = _without_quantization(value, depth - 1) if nested else value
        if key in _DTYPE_KEYS and isinstance(value, str) and "float8" in value:
            result[key] = "bfloat16"
    return result


def index_text(total_size: int, weight_map: Mapping[str, str]) -> str:
    """Return model.safetensors.index.json; `total_size` is the size of all tensors in bytes."""
    encoded = {shard: encode_basestring(shard) for shard in set(weight_map.values())}
    places = ",\n".join(  # as json indents it, which takes ten times as long
        [f"    {encode_basestring(name)}: {encoded[weight_map[name]]}" for name in sorted(weight_map)]
    )
    return f'{{\n  "metadata": {{\n    "total_size": {total_size}\n  }},\n  "weight_map": {{\n{places}\n  }}\n}}\n'
