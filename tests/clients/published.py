"""Tiny models of transformers as vLLM's classes expect published ones: keys that only published configs have, and their names of tensors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.sweep.tiny import build

_ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
KEYS: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid"},
    "deepseek_v3": _ROUTING,
    "deepseek_v32": _ROUTING,
    "glm4_moe": {"head_dim": 16},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "glm4v_moe": {"head_dim": 16},
    "glm_moe_dsa": _ROUTING,
    "gptj": {"rotary_dim": 16},
    "hy_v3": {"first_k_dense_replace": 1},
    "inkling_text": {"padded_vocab_size": 160},
    "lfm2": {"block_dim": 64, "block_ff_dim": 128, "block_multiple_of": 16, "block_auto_adjust_ff_dim": False, "conv_dim": 64, "conv_dim_out": 64},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mimo_v2_flash": {"hybrid_layer_pattern": [0, 1, 0, 1], "moe_layer_freq": [0, 1, 1, 1]},
    "minimax_m2": {"rotary_dim": 16, "use_qk_norm": True},
    "qwen3_vl_moe": {"norm_topk_prob": True},
}  # fmt: skip
_TOWER = re.compile(r"(vision_tower\.)(embeddings|encoder|post_layernorm|pre_layrnorm|head)\.")


def tiny(kind: str, folder: Path) -> Path:
    """Write a tiny model of a type, with the keys and the tensors' names of published checkpoints."""
    build(kind).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text.update(KEYS.get(kind, {}))
    (folder / "config.json").write_text(json.dumps(config))
    if config.get("vision_config", {}).get("model_type") in ("siglip_vision_model", "clip_vision_model"):
        for file in folder.glob("*.safetensors"):
            tensors = {_TOWER.sub(r"\1vision_model.\2.", name): values for name, values in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})
    return folder
