"""Tiny models of transformers as vLLM's classes expect published ones: keys that only published configs have, and their names of tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.sweep.tiny import build

_ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_SHORT_CONV = {
    "block_dim": 64, "block_ff_dim": 128, "block_multiple_of": 16, "block_auto_adjust_ff_dim": False, "conv_dim": 64, "conv_dim_out": 64,
}  # fmt: skip
KEYS: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1},
    "deepseek_v3": _ROUTING,
    "deepseek_v32": _ROUTING,
    "glm4_moe": {"head_dim": 16},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "glm4v_moe": {"head_dim": 16, "use_qk_norm": False},
    "glm_moe_dsa": _ROUTING,
    "gptj": {"rotary_dim": 16},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 128, "route_norm": True, "moe_router_use_sigmoid": True,
              "moe_router_enable_expert_bias": True, "qk_norm": True},
    "inkling_text": {"padded_vocab_size": 160, "use_embed_norm": False, "local_layer_ids": [0, 1, 2], "q_bias": False},
    "lfm2": _SHORT_CONV,
    "lfm2_vl": _SHORT_CONV,
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1], "moe_layer_freq": [0, 1, 1, 1], "layernorm_epsilon": 1e-5, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "swa_head_dim": 16, "swa_v_head_dim": 16, "v_head_dim": 16, "add_swa_attention_sink_bias": False,
        "add_full_attention_sink_bias": False, "attention_value_scale": 1.0, "sliding_window_size": 32, "swa_rope_theta": 1e4,
    },
    "minimax_m2": {"rotary_dim": 16, "use_qk_norm": True, "scoring_func": "sigmoid", "use_routing_bias": True},
    "qwen3_vl_moe": {"norm_topk_prob": True},
}  # fmt: skip
# Keys of other parts than the text model.
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "ernie4_5_vl_moe": {"vision_config": {"embed_dim": 64, "mlp_ratio": 2}},
    "qianfan_ocr": {"vision_config": {"image_size": 32, "patch_size": 8}},
    "qwen3_omni_moe": {
        "vision_config": {"image_size": 384, "apply_vit_abs_pos_embed": True},
        "text_config": {"tie_word_embeddings": False},
    },
}
# The class of a text model that vLLM builds inside of another one, as the `text_config` of published checkpoints says.
_TEXT = {
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "granite": "GraniteForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_INNER = re.compile(
    r"(language_model\.model\.|model\.language_model\.)model\."
)  # transformers keeps a head's module, published names do not
_TOWER = re.compile(r"(vision_tower\.)(embeddings|encoder|post_layernorm|pre_layrnorm|head)\.")


def tiny(kind: str, folder: Path) -> Path:
    """Write a tiny model of a type, with the keys and the tensors' names of published checkpoints."""
    build(kind).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text.update(KEYS.get(kind, {}))
    for part, values in PARTS.get(kind, {}).items():
        config.get("thinker_config", config)[part].update(values)
    if text.get("model_type") in _TEXT:
        text["architectures"] = [_TEXT[text["model_type"]]]
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, lambda name, values: (_INNER.sub(r"\1", name), values))
    if kind == "qwen3_vl_moe":
        rewrite(folder, lambda name, values: (name, values.mT.contiguous() if ".experts." in name else values))
    if (config.get("vision_config") or {}).get("model_type") in (
        "siglip_vision_model",
        "siglip2_vision_model",
        "clip_vision_model",
    ):
        rewrite(folder, lambda name, values: (_TOWER.sub(r"\1vision_model.\2.", name), values))
    return folder


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    """Write a folder's tensors anew, each under the name and with the values that `change` returns."""
    for file in folder.glob("*.safetensors"):
        save_file(dict(change(name, values) for name, values in load_file(file).items()), file, {"format": "pt"})
