"""Checkpoints as engines are given them, built from module names: what the judge is tested on."""

from __future__ import annotations

from typing import Any

from mfptq.engines.judge import Subject
from mfptq.engines.schemes import Shape

NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
LOCAL = {**NVFP4, "dynamic": "local"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
ROWS, COLUMNS = 64, 128


def group(
    weights: dict[str, Any] = NVFP4, inputs: Any = None, targets: tuple[str, ...] = ("Linear",)
) -> dict[str, Any]:
    return {"targets": list(targets), "weights": weights, "input_activations": inputs, "format": "any"}


def quantization(*groups: dict[str, Any], ignore: tuple[str, ...] = ("re:.*lm_head$",)) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "nvfp4-pack-quantized",
        "config_groups": {f"group_{number}": each for number, each in enumerate(groups or (group(),))},
        "ignore": list(ignore),
    }


def nvfp4(module: str, rows: int = ROWS, columns: int = COLUMNS, *, inputs: bool = False) -> dict[str, Shape]:
    tensors = {
        f"{module}.weight_packed": Shape("U8", (rows, columns // 2)),
        f"{module}.weight_scale": Shape("F8_E4M3", (rows, columns // 16)),
        f"{module}.weight_global_scale": Shape("F32", (1,)),
    }
    return {**tensors, f"{module}.input_global_scale": Shape("F32", (1,))} if inputs else tensors


def fp8(module: str, rows: int = ROWS, columns: int = COLUMNS) -> dict[str, Shape]:
    return {
        f"{module}.weight": Shape("F8_E4M3", (rows, columns)),
        f"{module}.weight_scale": Shape("F32", (rows, 1)),
    }


def modelopt(module: str, rows: int = ROWS, columns: int = COLUMNS) -> dict[str, Shape]:
    return {
        f"{module}.weight": Shape("U8", (rows, columns // 2)),
        f"{module}.weight_scale": Shape("F8_E4M3", (rows, columns // 16)),
        f"{module}.weight_scale_2": Shape("F32", ()),
        f"{module}.input_scale": Shape("F32", ()),
    }


def kept(module: str, *shape: int) -> dict[str, Shape]:
    return {f"{module}.weight": Shape("BF16", shape or (ROWS, COLUMNS))}


def llama(**changed: dict[str, Shape]) -> dict[str, Shape]:
    """Return a sound Llama of one layer in NVFP4 (W4A16); `changed` replaces a module, by its last part."""
    layer = "model.layers.0."
    names = [f"{layer}self_attn.{leaf}_proj" for leaf in "qkvo"]
    names += [f"{layer}mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
    tensors = {**kept("model.embed_tokens"), **kept("lm_head"), **kept("model.norm", COLUMNS)}
    for name in names:
        tensors |= changed.get(name.rpartition(".")[2], nvfp4(name))
    return tensors


def subject(
    tensors: dict[str, Shape],
    said: dict[str, Any] | None = None,
    architecture: str = "LlamaForCausalLM",
    *,
    config: dict[str, Any] | None = None,
    scalars: dict[str, float] | None = None,
) -> Subject:
    """Return a subject: `said` is its quantization config, `config` holds more keys of config.json."""
    inner = {"architectures": [architecture], "num_hidden_layers": 1}
    whole = {**inner, "quantization_config": quantization() if said is None else said, **(config or {})}
    return Subject(whole, tensors, ("config.json", "tokenizer.json"), scalars or {})
