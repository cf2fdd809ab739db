"""Read the sizes of the text model from config.json: how many blocks, how wide, how many attention heads.

Called by `names.structure`, which finds the decoder with them, and wherever `checkpoint.weights` needs the orientation of
experts. Configs of models with several parts hold those of the language model in a dictionary of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
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

    `depths` are numbers of blocks, `hidden` widths, `drafts` is how many draft layers there are. `model_types` are those of the
    model and of its parts, `towers` the parts whose sizes are those of images or sound. `is_nested`: the text model has a
    dictionary of its own, so that the model has other parts too. `adapters` are those that belong to the model itself.
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
    nested = [part for part in _text_parts(config) if _depths(part)]
    parts = nested or [config, *_side_parts(config)]
    every = list(_dictionaries(config))
    return ConfigSizes(
        depths=frozenset(number for part in parts for number in _depths(part)),
        hidden=_counts(parts, _HIDDEN),
        heads=frozenset(_heads(every)),
        drafts=max(_counts([config, *parts], _DRAFTS), default=0),
        vocabulary=_counts(parts, ["vocab_size"]),
        # Of the parts too: a GPT-2 that decodes for an image encoder is stored as GPT-2 is.
        model_types=frozenset(str(part.get("model_type", "")) for part in every),
        towers=frozenset(key.removesuffix("_config") for key, part in config.items() if _is_tower(part)),
        is_nested=bool(nested),
        is_tied=any(part.get("tie_word_embeddings") is True for part in (config, *nested)),
        adapters=frozenset(key.removesuffix("_lora") for key in config if key.endswith("_lora")),
    )


def _dictionaries(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a dictionary and all that are in it, at any depth."""
    yield part
    for value in part.values():
        if isinstance(value, dict):
            yield from _dictionaries(value)


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


def _depths(part: Mapping[str, Any]) -> list[int]:
    return [value for key, value in part.items() if _DEPTH.fullmatch(key) and _is_count(value)]


def _counts(parts: Iterable[Mapping[str, Any]], keys: Collection[str]) -> frozenset[int]:
    """Return the positive whole numbers that any of the parts has under any of the keys."""
    return frozenset(part[key] for part in parts for key in keys if _is_count(part.get(key)))


def _heads(parts: Iterable[Mapping[str, Any]]) -> Iterator[int]:
    """Yield numbers of attention heads: one for all layers, or a list of one for each."""
    for value in (part[key] for part in parts for key in _HEADS if key in part):
        yield from (number for number in (value if isinstance(value, list) else [value]) if _is_count(number))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
