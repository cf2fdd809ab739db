"""The text of config.json and of the index: what an engine reads to understand the tensors.

The keys are those that compressed-tensors 0.20 writes and that 0.17 and later accept; unknown keys inside `weights` or
`input_activations` would be refused by the versions that vLLM and SGLang pin.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any, Literal

from ..checkpoint.strict_json import dump_json
from ..checkpoint.weights import Candidate, name_pattern
from ..encodings.declared import MAX_CONFIG_DEPTH, QUANTIZATION_KEYS
from ..names import REGEX_PREFIX
from ..names.bridge import bare
from ..names.engine import EXPERTS, built_modules, experts_module, experts_parent
from ..names.fusion import parameters
from ..names.leaves import KEPT, TURNED, Leaf, kept_by, leaf_of
from ..names.patterns import match_names
from ..names.structure import Structure, block_of
from ..names.wrappers import logical
from .config_groups import LINEAR, config_group, config_groups, quantized_layers, top_level_format
from .defaults import is_kept_stack, siblings_of
from .format_choice import WITHOUT_INPUTS
from .formats import FORMATS, KV_CACHE_SCHEMES, QUANTIZATION_CONFIG, TargetFormat
from .rules import Rules, Selection

COMPRESSED_TENSORS = "0.20.0"
_ALL_EXPERTS = r".*\.experts(\..*)?$"

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
    others = list(
        dict.fromkeys(target for name, target in formats.items() if name not in lacking) if lacking else found
    )
    single = len(others) == 1 and all(WITHOUT_INPUTS.get(others[0].name) == formats[name].name for name in lacking)
    if len(found) == 1 or single:
        groups = {"group_0": config_group(others[0], [LINEAR, *head_targets(formats)])}
        if len(found) > 1:
            alone = [group for group in selection.groups if group.members[0] in lacking]
            names = sorted({name for group in alone for name in (group.name, *group.members)})
            groups["group_1"] = config_group(formats[alone[0].members[0]], names)
    else:
        groups = config_groups(quantized_layers(selection.groups, formats))
    return _config(
        groups,
        top_level_format(found),
        ignore_list(selection, rules),
        kv_cache,
    )


def _lacking(selection: Selection, formats: Mapping[str, TargetFormat]) -> frozenset[str]:
    """Return the modules that were to have the format of the others, and lack the input scale that it needs."""
    return frozenset(
        weight.module
        for item in selection.tensors
        if item.decision.format in WITHOUT_INPUTS
        for weight in item.candidate.weights
        if formats[weight.module].name != item.decision.format
    )


def ignore_list(selection: Selection, rules: Rules) -> list[str]:
    """Return the regexes, then the explicit names, of what is kept: some readers know only one of the two.

    Last come the names of layers that engines fuse from what is kept, where no regex matches them.
    A regex is listed if something kept matches it and nothing quantized does, so that config and tensors always agree.
    Heads' are listed even where tied embeddings leave no tensor: models still build the layer.
    """
    kept = sorted({name for item in selection.tensors if not item.decision.quantize for name in _built(item.candidate)})
    joined = sorted({group.name for group in selection.groups if len(group.members) > 1})
    named = [*joined, *(member for group in selection.groups for member in group.members)]
    asked = match_names([pattern for pattern in rules.ignore if pattern.startswith(REGEX_PREFIX)], named)
    samples = selection.sample_groups
    quantized = [name for group in samples for name in (group.name, *group.members)]
    listed = [pattern for pattern, swallowed in asked.items() if not swallowed]
    if rules.use_defaults:
        listed += _default_patterns(kept, {name_pattern(logical(name), "0") for name in quantized})
    stacks = [item.candidate for item in selection.tensors if is_kept_stack(item.candidate)]
    listed += _experts_patterns(selection.structure, stacks, quantized)
    listed += _draft_patterns(selection.structure, quantized)
    listed += _tower_patterns(selection.structure, kept, quantized)
    listed += _outside_patterns([name for name in kept if not _listed_in(listed, name)], quantized)
    return [*dict.fromkeys(listed), *kept, *(name for name in _fused(selection, kept) if not _listed_in(listed, name))]


def _outside_patterns(kept: Iterable[str], quantized: Collection[str]) -> Iterator[str]:
    """Yield patterns for what is kept outside of blocks, since engines build some of it below modules of their own."""
    outside = [bare(name).split(".") for name in kept if block_of(name) is None]
    for name in sorted(
        {r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts) for parts in outside}
    ):
        pattern = rf"re:(.*\.)?{name}$"
        if not _matches_any(pattern, quantized):
            yield pattern


def _fused(selection: Selection, kept: Sequence[str]) -> Iterator[str]:
    """Yield the names of parameters that engines build of kept layers; of experts they ask for the members."""
    siblings = siblings_of(item.candidate.tensor.info.name for item in selection.tensors)
    for group in parameters([name for name in kept if experts_parent(name) is None], siblings):
        yield group.name


def _listed_in(patterns: Iterable[str], name: str) -> bool:
    return any(_matches_any(pattern, [name]) for pattern in patterns)


def head_targets(modules: Iterable[str]) -> list[str]:
    """Return patterns for those of the quantized modules that engines do not build as linear layers: output heads."""
    outside = (name for name in modules if f".{EXPERTS}." not in name)  # heads are no experts, of which there are many
    kinds = {name_pattern(logical(name), "0") for name in outside}
    heads = {leaf_of(kind) for kind in kinds if any(line.role == "head" for line in kept_by(kind))}
    return [rf"re:(.*\.)?{re.escape(leaf)}$" for leaf in sorted(heads)]


def _default_patterns(kept: Sequence[str], quantized: Collection[str]) -> Iterator[str]:
    """Yield the default patterns that belong in the list; no pattern looks at a number."""
    kinds = {name_pattern(logical(name), "0") for name in kept}
    heads = [line for line in KEPT if line.role == "head" and line.is_listed]
    without_head = not any(_matches_any(line.pattern, kinds) for line in heads)
    for line in KEPT:
        if line.role == TURNED or not line.is_listed:
            continue
        wanted = any(_matches_any(pattern, kinds) for pattern in (line.pattern, *_aliases(line))) or (
            line.role == "head" and (line is heads[0] or without_head)
        )
        if wanted and not _matches_any(line.pattern, quantized):
            yield line.pattern


def _aliases(line: Leaf) -> list[str]:
    return [rf"(.*\.)?{regex}(\..*)?$" for regex in line.aliases]


def _experts_patterns(structure: Structure, stacks: Iterable[Candidate], quantized: Iterable[str]) -> Iterator[str]:
    """Yield patterns for the experts of stacks that stay as they are, which engines look for under other names."""
    homes = [
        experts_module(item.tensor.info.name, item.tensor.info.shape)
        for item in stacks
        if not structure.outside(item.module)
    ]
    if homes and not any(re.match(_ALL_EXPERTS, name) for name in quantized):
        yield REGEX_PREFIX + _ALL_EXPERTS
        return
    for home in dict.fromkeys(homes):
        block = block_of(home)
        tail = home if block is None else f"{block.stack.rpartition('.')[2]}.{block.number}.{block.rest}"
        yield rf"re:(.*\.)?{re.escape(tail)}(\..*)?$"


def _draft_patterns(structure: Structure, quantized: Iterable[str]) -> Iterator[str]:
    """Yield patterns for draft layers, which engines number on from the decoder's last block."""
    numbers = structure.draft_numbers()
    blocks = {f"{block.stack}.{block.number}." for name in quantized if (block := block_of(name))} if numbers else set()
    for number in numbers:
        if not any(re.match(rf".*layers\.{number}\..*", name) for name in blocks):
            yield rf"re:.*layers\.{number}\..*"


def _tower_patterns(structure: Structure, kept: Sequence[str], quantized: Collection[str]) -> Iterator[str]:
    """Yield patterns for towers' blocks as engines name them that leave out the tower's own name."""
    for tail in structure.tower_tails():
        pattern = rf"re:(.*\.)?{re.escape(tail)}\.\d+\..*"
        if _matches_any(pattern, kept) and not _matches_any(pattern, quantized):
            yield pattern


def _matches_any(pattern: str, names: Iterable[str]) -> bool:
    regex = re.compile(pattern.removeprefix(REGEX_PREFIX))
    return any(regex.match(name) for name in names)


def _built(item: Candidate) -> Iterator[str]:
    """Yield the layers that an engine may build for a tensor that is kept; of experts kept by their layout, the first's."""
    shape = item.tensor.info.shape
    return built_modules(item.tensor.info.name, (1, *shape[1:]) if is_kept_stack(item) and len(shape) == 3 else shape)


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
