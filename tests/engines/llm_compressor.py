"""A checkpoint as llm-compressor's `model_free_ptq` writes it (0.14, scheme NVFP4A16), made without llm-compressor.

It joins q, k and v, and gate and up of a dense MLP; `in_proj_qkv` and `in_proj_z`, and gate and up of routed and shared experts,
get a global scale each. Stacks of experts are split, the drafter's too. `tests/clients/test_llm_compressor.py` compares the
two, bit for bit, where llm-compressor is installed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import mfptq

IGNORE = [
    "re:.*lm_head$", "re:.*embed_tokens$", "re:.*visual.*", "re:.*mtp.*", "re:.*in_proj_[ab]$", "re:.*conv1d$", "re:.*norm$",
    "re:.*mlp.gate$", "re:.*shared_expert_gate$",
]  # fmt: skip
JOINED = re.compile(r".*\.(self_attn\.[qkv]_proj|layers\.\d+\.mlp\.(gate|up)_proj)")
_WEIGHTS = {
    "num_bits": 4, "type": "float", "symmetric": True, "group_size": 16, "strategy": "tensor_group", "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn", "observer": None, "observer_kwargs": {}, "actorder": None, "zp_dtype": None,
    "block_structure": None,
}  # fmt: skip
FUSED = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up",
    "in_proj_qkv": "qkvz", "in_proj_z": "qkvz",
}  # fmt: skip
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "quantization_status": "compressed",
    "version": "0.19.0",
    "ignore": IGNORE,
    "config_groups": {
        "NVFP4A16": {
            "targets": ["Linear"], "format": "nvfp4-pack-quantized", "input_activations": None,
            "output_activations": None, "weights": _WEIGHTS,
        }
    },
}  # fmt: skip


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def unstacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with stacks of experts as one matrix for each expert and projection."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = matrix.chunk(2) if leaf == "gate_up_proj" else (matrix,)
            leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            found |= {
                f"{parent}.{expert}.{each}.weight": part.contiguous() for each, part in zip(leaves, parts, strict=True)
            }
    return found


def write_as_llm_compressor(source: Path, folder: Path) -> Path:
    """Write what `model_free_ptq` makes of a checkpoint in the demo's layout, as one file."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = unstacked(read(source))
    regexes = [re.compile(entry.removeprefix("re:")) for entry in IGNORE]
    modules = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight")
        and tensor.dim() == 2
        and not any(r.match(name.removesuffix(".weight")) for r in regexes)
    ]
    tensors = mfptq.quantize_state_dict(tensors, [name for name in modules if JOINED.fullmatch(name)], method="minmax")
    for module in modules:
        if not JOINED.fullmatch(module):
            tensors = mfptq.quantize_state_dict(tensors, [module], method="minmax")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return folder


def unequal_groups(tensors: dict[str, torch.Tensor]) -> set[str]:
    """Return the parents of fused partners with unequal global scales: the second opinion, from names alone."""
    scales: dict[tuple[str, str], set[float]] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        if suffix == "weight_global_scale" and leaf in FUSED:
            scales.setdefault((parent, FUSED[leaf]), set()).add(float(tensor))
    return {parent for (parent, _), values in scales.items() if len(values) > 1}


def layer_errors(weights: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the relative error of each layer as an engine holds it, fused partners together."""
    sums: dict[str, list[float]] = {}
    for module, weight in weights.items():
        parent, _, leaf = module.rpartition(".")
        original = exact[f"{module}.weight"].double()
        found = sums.setdefault(f"{parent}.{FUSED.get(leaf, leaf)}", [0.0, 0.0])
        found[0] += float((weight.double() - original).square().sum())
        found[1] += float(original.square().sum())
    return {layer: (wrong / whole) ** 0.5 for layer, (wrong, whole) in sums.items()}


def as_served(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights as vLLM computes with them: the largest divisor of fused partners for all, an expert's gate's for up."""
    divisors = {
        name.rpartition(".")[0]: float(t) for name, t in tensors.items() if name.endswith("weight_global_scale")
    }
    partners = {"q_proj": ("k_proj", "v_proj"), "k_proj": ("q_proj", "v_proj"), "v_proj": ("q_proj", "k_proj"),
                "gate_proj": ("up_proj",), "up_proj": ("gate_proj",), "in_proj_qkv": ("in_proj_z",),
                "in_proj_z": ("in_proj_qkv",)}  # fmt: skip
    served = {}
    for module, own in divisors.items():
        parent, _, leaf = module.rpartition(".")
        others = [divisors[f"{parent}.{each}"] for each in partners.get(leaf, ())]
        taken = max([own, *others])
        if ".experts." in module and leaf == "up_proj":
            taken = others[0]
        packed, scale = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"]
        served[module] = mfptq.dequantize_nvfp4(mfptq.Nvfp4Tensor(packed, scale, taken, mfptq.ErrorStats()))
    return served
