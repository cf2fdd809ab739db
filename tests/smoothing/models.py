"""Tiny transformers models whose blocks are known, and what smoothing makes of them before anything is quantized."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mfptq.calibration.file import InputInfo
from mfptq.calibration.reading import load_calibration
from mfptq.checkpoint.encoding import Region
from mfptq.dtypes import NUMPY_DTYPES
from mfptq.kernels.decode import load_decoder
from mfptq.planner import make_plan

from ..calibration.files import calibrate, random_inputs, statistics_of, write_file
from ..models import DENSE, MOE, write_checkpoint

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
PLAIN = (  # a norm's weight is all that it multiplies by
    "llama", "mistral", "mixtral", "qwen2", "qwen3_moe", "qwen3", "deepseek_v3", "deepseek_v2", "glm4_moe", "qwen2_moe",
    "granite", "smollm3", "olmoe", "seed_oss",
)  # fmt: skip
ADDED = ("gemma", "gemma2", "gemma3_text", "qwen3_next")  # 1 is added to it


def configured(kind: str) -> Any:
    """Return the configuration of a tiny model of a type."""
    from transformers import AutoConfig

    more: dict[str, Any] = {}
    if kind == "llama":
        more = {"attention_bias": True, "mlp_bias": True}
    elif kind == "mixtral":
        more = {"num_local_experts": 4, "num_experts_per_tok": 2}
    elif kind in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
        more = {**EXPERTS, **LATENT, **ROUTED, "head_dim": 16}
    elif "moe" in kind or kind == "qwen3_next":
        more = {**EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []}
        more |= {"head_dim": 16} if kind == "olmoe" else {}
    if kind == "qwen3_next":
        heads = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
        more |= {**heads, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    return AutoConfig.for_model(kind, **SIZES | more)


def write_model(folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a model with random weights, norms included; those of Qwen3.5 in their published layout."""
    if kind in (DENSE, MOE):
        return write_checkpoint(folder, kind, "single")
    random_model(kind, dtype).save_pretrained(folder)
    return folder


@cache
def random_model(kind: str, dtype: torch.dtype) -> Any:
    """Return a tiny model of a type, made once for all who only write it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(configured(kind)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def fold(source: Path, folder: Path, **decisions: Any) -> Path:
    """Write the model as a smoothed conversion reads it, nothing quantized."""
    decisions.setdefault("calibration", calibrate(source, folder.with_suffix(".calibration.safetensors")))
    plan = make_plan(source, smooth=True, **decisions)
    assert plan.smoothing is not None
    assert plan.smoothing.powers
    folder.mkdir()
    tensors = {}
    for tensor in plan.contents:
        values = np.empty(tensor.info.nbytes, np.uint8)
        if tensor.encoding is None:
            plan.checkpoint.source.read_into(tensor.shard, tensor.offset, values.data)
        else:
            matrix = tensor.matrix
            region = Region(0, matrix.rows, 0, matrix.columns)
            held = values.view(NUMPY_DTYPES[tensor.info.dtype])
            tensor.encoding.decode(plan.checkpoint.source, region, held, load_decoder())
        tensors[tensor.info.name] = torch.frombuffer(values, dtype=TORCH[tensor.info.dtype]).reshape(tensor.info.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(plan.checkpoint.config))
    plan.close()
    return folder


def smoothed_file(source: Path, path: Path, output: Path) -> Path:
    """Write the statistics of the smoothed inputs, computed from activations instead of from statistics."""
    plan = make_plan(source, calibration=path, smooth=True)
    inputs = {}
    for seed, info in enumerate(load_calibration(path).inputs.values()):
        exact = random_inputs(info.columns, seed=seed)
        divided = exact * 2.0 ** -plan.smoothing.inputs.get(info.name, np.zeros(1)).astype(float)
        inputs[InputInfo(info.name, info.columns, info.modules)] = statistics_of(divided)
    plan.close()
    return write_file(output, inputs)


def logits(folder: Path, dtype: torch.dtype | str = "auto") -> torch.Tensor:
    """Return what a model predicts for some text, computed by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    pictures = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    model_class = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
    model = model_class.from_pretrained(folder, dtype=dtype).eval()
    model.set_experts_implementation("eager")
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found
