"""The text of config.json and of the index: what an engine reads to understand the tensors.

The keys are those that compressed-tensors 0.20 writes and that 0.17 and later accept; unknown keys inside `weights` or
`input_activations` would be refused by the versions that vLLM and SGLang pin.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from json.encoder import encode_basestring
from typing import Any, Literal

from ..checkpoint.strict_json import dump_json
from ..checkpoint.weights import WEIGHT_SUFFIX
from ..names.patterns import REGEX_PREFIX, match_names
from ..nvfp4 import BLOCK_SIZE
from .rules import DEFAULT_RULES, Rules, Selection, TensorDecision

FORMAT = "nvfp4-pack-quantized"
COMPRESSED_TENSORS = "0.20.0"
QUANTIZATION_CONFIG = "quantization_config"
HEAD_PATTERN = r"re:.*lm_head$"

Scheme = Literal["NVFP4", "NVFP4A16"]

_ARGUMENTS = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "group_size": BLOCK_SIZE,
    "strategy": "tensor_group",
    "scale_dtype": "torch.float8_e4m3fn",
}


def quantization_config(scheme: Scheme, ignore: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint; `NVFP4A16` leaves activations as they are."""
    activations = {**_ARGUMENTS, "dynamic": "local", "observer": "static_minmax"}
    return {
        "config_groups": {
            "group_0": {
                "format": FORMAT,
                "input_activations": activations if scheme == "NVFP4" else None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {**_ARGUMENTS, "dynamic": False},
            }
        },
        "format": FORMAT,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": COMPRESSED_TENSORS,
    }


def ignore_list(selection: Selection, rules: Rules) -> list[str]:
    """Return the regexes, then the explicit names, of what is kept: some readers know only one of the two.

    A regex is listed if something kept matches it and nothing quantized does, so that config and tensors always agree.
    The head's is listed even where tied embeddings leave no `lm_head` tensor: models still build the layer.
    """
    kept = sorted({name for item in selection.tensors if not item.decision.quantize for name in _linear_names(item)})
    fused = sorted({group.name for group in selection.groups if len(group.members) > 1})
    quantized = [*fused, *(member for group in selection.groups for member in group.members)]
    asked = match_names([pattern for pattern in rules.ignore if pattern.startswith(REGEX_PREFIX)], fused)
    listed = [pattern for pattern, swallowed in asked.items() if not swallowed]
    for rule in DEFAULT_RULES if rules.use_defaults else ():
        wanted = rule.pattern == HEAD_PATTERN or _matches_any(rule.pattern, kept)
        if wanted and not _matches_any(rule.pattern, quantized):
            listed.append(rule.pattern)
    return [*listed, *kept]


def _matches_any(pattern: str, names: Iterable[str]) -> bool:
    regex = re.compile(pattern.removeprefix(REGEX_PREFIX))
    return any(regex.match(name) for name in names)


def _linear_names(item: TensorDecision) -> Iterable[str]:
    """Yield the names under which an engine may build a layer for a tensor that is kept."""
    info = item.candidate.tensor.info
    if item.candidate.is_stack:
        yield from (weight.module for weight in item.candidate.weights)
    elif info.name.endswith(WEIGHT_SUFFIX) and len(info.shape) >= 2:
        yield item.candidate.module


def config_text(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> str:
    """Return config.json: the source's keys in their order, then the quantization; an inner one is dropped."""
    result = {key: value for key, value in config.items() if key != QUANTIZATION_CONFIG}
    text_config = result.get("text_config")
    if isinstance(text_config, dict):
        result["text_config"] = {key: value for key, value in text_config.items() if key != QUANTIZATION_CONFIG}
    return dump_json({**result, QUANTIZATION_CONFIG: quantization})


def index_text(total_size: int, weight_map: Mapping[str, str]) -> str:
    """Return model.safetensors.index.json; `total_size` is the size of all tensors in bytes."""
    encoded = {shard: encode_basestring(shard) for shard in set(weight_map.values())}
    places = ",\n".join(  # as json indents it, which takes ten times as long
        [f"    {encode_basestring(name)}: {encoded[weight_map[name]]}" for name in sorted(weight_map)]
    )
    return f'{{\n  "metadata": {{\n    "total_size": {total_size}\n  }},\n  "weight_map": {{\n{places}\n  }}\n}}\n'
