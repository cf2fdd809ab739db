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
from ..names.engine import built_modules, experts_module
from ..names.fusion import FusedGroup
from ..names.leaves import KEPT, TURNED, Leaf, kept_by, leaf_of
from ..names.patterns import REGEX_PREFIX, match_names
from ..names.structure import Structure, block_of
from ..names.wrappers import logical
from ..nvfp4 import BLOCK_SIZE
from .defaults import is_kept_stack
from .rules import Rules, Selection

FORMAT = "nvfp4-pack-quantized"
COMPRESSED_TENSORS = "0.20.0"
QUANTIZATION_CONFIG = "quantization_config"
_ALL_EXPERTS = r".*\.experts(\..*)?$"

_STORED_AS = ("expert_dtype", "moe_quant_algo")
_DTYPE_KEYS = ("dtype", "torch_dtype")

Scheme = Literal["NVFP4", "NVFP4A16"]

_ARGUMENTS = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "group_size": BLOCK_SIZE,
    "strategy": "tensor_group",
    "scale_dtype": "torch.float8_e4m3fn",
}


def quantization_config(
    scheme: Scheme, ignore: Iterable[str], targets: Iterable[str] = (), weight_only: Collection[str] = ()
) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint; `NVFP4A16` leaves activations as they are.

    `targets` are patterns of quantized layers that engines do not count as linear. `weight_only` names layers of an `NVFP4`
    checkpoint whose activations stay as they are too. They have a group of their own: engines ask for names before classes.
    """
    groups = [_group(["Linear", *targets], with_input=scheme == "NVFP4")]
    if weight_only:
        groups.append(_group(list(weight_only), with_input=False))
    return {
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "format": FORMAT,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": COMPRESSED_TENSORS,
    }


def _group(targets: list[str], *, with_input: bool) -> dict[str, Any]:
    activations = {**_ARGUMENTS, "dynamic": "local", "observer": "static_minmax"}
    return {
        "format": FORMAT,
        "input_activations": activations if with_input else None,
        "output_activations": None,
        "targets": targets,
        "weights": {**_ARGUMENTS, "dynamic": False},
    }


def weight_only_names(groups: Iterable[FusedGroup], with_input: Collection[str]) -> list[str]:
    """Return the names of quantized modules without an input scale, and of the layers that engines fuse them into.

    None where no module has one: all are alike then.
    """
    if not with_input:
        return []
    alone = [group for group in groups if not any(member in with_input for member in group.members)]
    return sorted({name for group in alone for name in (group.name, *group.members)})


def ignore_list(selection: Selection, rules: Rules) -> list[str]:
    """Return the regexes, then the explicit names, of what is kept: some readers know only one of the two.

    A regex is listed if something kept matches it and nothing quantized does, so that config and tensors always agree.
    Heads' are listed even where tied embeddings leave no tensor: models still build the layer.
    """
    kept = sorted({name for item in selection.tensors if not item.decision.quantize for name in _built(item.candidate)})
    fused = sorted({group.name for group in selection.groups if len(group.members) > 1})
    quantized = [*fused, *(member for group in selection.groups for member in group.members)]
    asked = match_names([pattern for pattern in rules.ignore if pattern.startswith(REGEX_PREFIX)], fused)
    listed = [pattern for pattern, swallowed in asked.items() if not swallowed]
    if rules.use_defaults:
        listed += _default_patterns(kept, {name_pattern(logical(name), "0") for name in quantized})
    stacks = [item.candidate for item in selection.tensors if is_kept_stack(item.candidate)]
    listed += _experts_patterns(selection.structure, stacks, quantized)
    listed += _draft_patterns(selection.structure, quantized)
    return [*dict.fromkeys(listed), *kept]


def head_targets(modules: Iterable[str]) -> list[str]:
    """Return patterns for those of the quantized modules that engines do not build as linear layers: output heads."""
    kinds = {name_pattern(logical(name), "0") for name in modules}
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
