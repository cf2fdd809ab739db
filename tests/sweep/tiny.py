"""Tiny models of every type that transformers can build: sizes are found by their names in the type's own configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.sweep.fixed import FIXED, NEEDED

HEADS = (
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
)  # fmt: skip
HIDDEN, INNER, LAYERS, VOCABULARY = 64, 128, 4, 160
MOST = 120e6  # parameters of what still counts as tiny

# The first pattern that a key matches whole gives its value.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*(token_id|token_index|token|_idx)s?", 1),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"num_(feat_extract|conv|adapter)_layers|num_conv_pos_embeddings.*|num_kv_shared_layers", 10**9),
    (r"(.*_)?(type_vocab_size|num_languages|num_labels)", 2),
    (r".*vocab(ulary)?(_size.*)?", VOCABULARY),
    (r"(.*_)?(num_)?(hidden_)?layers|n_layers?|depth|num_blocks|num_decoder_blocks|(encoder|decoder)_num_hidden_layers", LAYERS),
    (r"num_hidden_groups|num_mem_blocks", 1),
    (r"(.*_)?(num_)?(first_k_dense_replace|num_dense_layers|moe_layer_start_index|n_dense_layers)", 1),
    (r"(.*_)?((num_)?key_value_heads|num_kv_heads|kv_heads|num_query_groups|multi_query_group_num|n_kv_heads)", 2),
    (r"(.*_)?(num_)?(attention_)?heads|n_head|n_heads|num_heads|(.*_)?attention_heads", 4),
    (r"(.*_)?(kv_lora_rank|q_lora_rank|o_lora_rank)", 32),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|(.*_)?head_dim|(.*_)?d_kv|kv_channels|attention_head_size|d_head", 16),
    (r"(.*_)?(moe|shared|expert|ffn|feed_forward|intermediate).*(intermediate|hidden|inner|ffn|feed_forward)?_?(size|dim)", INNER),
    (r"(.*_)?(ffn_dim|d_ff|d_inner|n_inner|intermediate_size|ff_dim|mlp_dim|dim_ff|inner_dim|expert_dim)", INNER),
    (r"(.*_)?(hidden_size|d_model|n_embd|n_embed|embed_dim|embedding_size|emb_dim|hidden_dim|model_dim|dim|width)", HIDDEN),
    (r"(.*_)?(n_group|topk_group|n_groups)", 1),
    (r"(.*_)?(n_shared_experts|num_shared_experts)", 1),
    (r"(.*_)?(num_experts_per_tok.*|top_k.*|topk|moe_topk|experts_per_token|num_selected_experts)", 2),
    (r"(.*_)?(num|n)_(local_|routed_)?experts|num_experts|moe_num_experts|n_experts", 4),
    (r"(.*_)?max_.*(positions?|position_embeddings|length|seq_len|source_positions|target_positions)|n_positions|n_ctx", 128),
    (r"image_size", 32),
    (r"patch_size", 8),
)  # fmt: skip
_COMPILED = [(re.compile(pattern), value) for pattern, value in SIZES]
_DERIVED = re.compile(
    r"layer_types|.*_layer_types|block_types|layers_block_type|attention_layers|no_rope_layers|moe_layers|mlp_layer_types|"
    r"hybrid_override_pattern|layers_types|per_layer_config|full_attn_idxs|attn_layer_indices|hybrid_layer_ids|num_attention_heads_per_layer|"
    r"per_layer_config|mlp_only_layers|cross_attention_layers|transformers_version|architectures|id2label|label2id|torch_dtype|dtype|_name_or_path"
)


def types() -> dict[str, tuple[str, ...]]:
    """Return every model type with a head that makes or judges tokens, and the classes that have it."""
    from transformers.models.auto import modeling_auto

    found: dict[str, dict[str, None]] = {}
    for mapping in HEADS:
        for kind, name in getattr(modeling_auto, mapping, {}).items():
            found.setdefault(kind, {}).update(dict.fromkeys([name] if isinstance(name, str) else name))
    return {kind: tuple(names) for kind, names in sorted(found.items())}


def small(config: dict[str, Any], *, keep_lists: bool = False) -> dict[str, Any]:
    """Return a configuration's values with small sizes; what follows from others is cut to size, or left out."""
    depths = {value for key, value in config.items() if isinstance(value, int) and _size(key) == LAYERS}
    result = {}
    for key, value in config.items():
        if isinstance(value, list) and len(value) in depths - {2, 3}:
            if keep_lists or not _DERIVED.fullmatch(str(key)):
                result[key] = value[:LAYERS]
        elif isinstance(value, dict) and not _DERIVED.fullmatch(str(key)):
            result[key] = small(value, keep_lists=keep_lists)
        elif not _DERIVED.fullmatch(str(key)):
            result[key] = _value(key, value)
    return _merged(result, FIXED.get(config.get("model_type", ""), {}))


def _merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Return values with others put in their places, inside of dictionaries too."""
    inner = {key: _merged(values[key], value) if isinstance(values.get(key), dict) else value
             for key, value in others.items() if isinstance(value, dict)}  # fmt: skip
    return {**values, **others, **inner}


def _size(key: str) -> int | None:
    return next((size for regex, size in _COMPILED if regex.fullmatch(str(key))), None)


def _value(key: str, value: Any) -> Any:
    if value is None and key in ("head_dim", "num_key_value_heads"):
        return _size(key)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    size = _size(key)
    return value if size is None or value <= 0 else min(value, size)


def attempts(kind: str) -> Iterator[Any]:
    """Yield ways to make a tiny configuration of a model type, the most natural first."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    make = getattr(
        transformers, CONFIG_MAPPING_NAMES[kind]
    )  # not what an engine has put in its place for all of the process
    for keep_lists in (False, True):
        values = small(make(**NEEDED.get(kind, {})).to_dict(), keep_lists=keep_lists)
        for without in ((), ("rope_parameters",), ("rope_scaling", "rope_parameters")):
            for heads in ({}, {"num_key_value_heads": 4}):
                found = {key: value for key, value in {**values, **heads}.items() if key not in without}
                yield lambda found=found: make(**found)


def build(kind: str) -> Any:
    """Return a tiny model with random weights in bfloat16; raises what transformers raises where it cannot."""
    import torch
    import transformers

    failure: Exception = ValueError(kind)
    for attempt in attempts(kind):
        for name in types()[kind]:
            try:
                config = attempt()
                config.dtype = torch.bfloat16
                torch.manual_seed(0)
                with torch.device("meta"):
                    size = sum(parameter.numel() for parameter in getattr(transformers, name)(config).parameters())
                if size > MOST:
                    raise ValueError(f"{size / 1e6:.0f} million parameters are not tiny")
                return getattr(transformers, name)(config).to(torch.bfloat16).eval()
            except Exception as error:  # whatever a model's code raises for sizes it does not expect
                failure = error
    raise failure
