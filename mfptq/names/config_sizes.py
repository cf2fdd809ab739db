"""Sizes of the text model as config.json tells them: how many blocks, how wide, how many attention heads.

`structure.py` finds the decoder with them, `checkpoint/weights.py` the orientation of experts. Configs of models with
several parts hold those of the language model in a dictionary of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_TEXT = ("text_config", "llm_config", "language_config", "language_model_config", "lm_config", "thinker_config")
_PARTS = ("encoder", "decoder", "encoder_config", "decoder_config", "text_encoder", "text_decoder")
_OTHER_MODALITY = (
    "image_size", "num_mel_bins", "num_channels", "patch_size", "sampling_rate", "num_feat_extract_layers",
)  # fmt: skip
_DEPTH = re.compile(
    r"(num_)?(hidden_)?layers|n_layers?|num_blocks|(num_)?(encoder|decoder)_layers|"
    r"((encoder|decoder)_num|num_(encoder|decoder))_hidden_layers|"
    r"num_layers_per_stack|n_(input|recurrent|output)_layers|num_hidden_groups|num_self_attends_per_block"
)
_HIDDEN = frozenset(
    {"hidden_size", "d_model", "n_embd", "n_embed", "dim", "embed_dim", "emb_dim", "model_dim", "hidden_dim"}
)
_HEADS = frozenset({"num_attention_heads", "n_head", "n_heads", "num_heads", "num_attention_heads_per_layer"})
_DRAFTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers", "num_mtp_modules")


@dataclass(frozen=True, slots=True)
class ConfigSizes:
    """What config.json says of the text model; empty where it says nothing.

    `model_types` are those of the model and of its parts; `towers` are the parts whose sizes are those of images or sound; `is_nested`: the text model has a dictionary of its own, so that the model has other parts too.
    """

    depths: frozenset[int] = frozenset()
    hidden: frozenset[int] = frozenset()
    heads: frozenset[int] = frozenset()
    drafts: int = 0
    vocabulary: frozenset[int] = frozenset()
    model_types: frozenset[str] = frozenset()
    towers: frozenset[str] = frozenset()
    is_nested: bool = False
    is_tied: bool = False
    adapters: frozenset[str] = frozenset()


def read_sizes(config: Mapping[str, Any]) -> ConfigSizes:
    """Return the sizes that a config holds, whatever its family calls them."""
    nested = [part for part in _text_parts(config) if _numbers(part, _is_depth)]
    parts = nested or [config, *_side_parts(config)]
    return ConfigSizes(
        depths=frozenset(number for part in parts for number in _numbers(part, _is_depth)),
        hidden=frozenset(number for part in parts for number in _numbers(part, _HIDDEN.__contains__)),
        heads=frozenset(_heads(config)),
        drafts=max(
            (part.get(key, 0) for part in (config, *parts) for key in _DRAFTS if _is_count(part.get(key))), default=0
        ),
        vocabulary=frozenset(number for part in parts for number in _numbers(part, "vocab_size".__eq__)),
        model_types=frozenset(_model_types(config)),
        towers=frozenset(key.removesuffix("_config") for key, part in config.items() if _is_tower(part)),
        is_nested=bool(nested),
        is_tied=any(part.get("tie_word_embeddings") is True for part in (config, *nested)),
        adapters=frozenset(key.removesuffix("_lora") for key in config if key.endswith("_lora")),
    )


def _text_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key in _TEXT:
        part = config.get(key)
        if isinstance(part, dict):
            inner = list(_text_parts(part))
            yield from inner or [part]


def _side_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key in _PARTS:
        part = config.get(key)
        if isinstance(part, dict) and not _is_tower(part):
            yield part
            yield from _text_parts(part)


def _is_tower(part: object) -> bool:
    return isinstance(part, dict) and any(name in part for name in _OTHER_MODALITY)


def _numbers(part: Mapping[str, Any], wanted: Any) -> list[int]:
    return [value for key, value in part.items() if wanted(key) and _is_count(value)]


def _is_depth(key: str) -> bool:
    return _DEPTH.fullmatch(key) is not None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the types of a model and of its parts: a GPT-2 that decodes for an image encoder is stored as GPT-2 is."""
    yield str(config.get("model_type", ""))
    for value in config.values():
        if isinstance(value, dict):
            yield from _model_types(value)


def _heads(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _heads(value)
        elif key in _HEADS:
            yield from (number for number in (value if isinstance(value, list) else [value]) if _is_count(number))
