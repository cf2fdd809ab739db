"""vLLM's own classes and loader on conversions of tiny models: drafters stay as they are, fused parameters are the twin's.

Slow: each test builds a model of vLLM's twice. Models are those of transformers; what is published beside them, drafters and
codes, is added here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file, save_file

from tests.clients.dequantize import write_twin
from tests.clients.published import tiny
from tests.clients.vllm_loading import load, prepare_vllm, unfilled, weights
from tests.conftest import command

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def vllm_on_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_vllm(monkeypatch)


def change(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    """Write the tensors and the config of a checkpoint of one file anew."""
    (folder / "config.json").write_text(json.dumps(config))
    separate = {name: values.clone().contiguous() for name, values in tensors.items()}
    save_file(separate, folder / "model.safetensors", {"format": "pt"})


def matrix(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 0.02).to(torch.bfloat16)


def parts_of_block(tensors: Tensors, number: int) -> Tensors:
    """Return the tensors of one of the decoder's blocks, named from the block on."""
    mark = f"layers.{number}."
    return {name.partition(mark)[2]: values for name, values in tensors.items() if mark in name}


def with_drafter(folder: Path, kind: str) -> Path:
    """Add a draft layer under the names that published checkpoints of this type have, a copy of one of the decoder's blocks."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    layers, hidden, rows = text["num_hidden_layers"], text["hidden_size"], text["vocab_size"]
    wide, norm = (hidden, 2 * hidden), torch.ones(hidden, dtype=torch.bfloat16)
    block = parts_of_block(tensors, 0 if kind == "ernie4_5_moe" else layers - 1)
    if kind == "ernie4_5_moe":
        added = {f"model.mtp_block.0.{name}": values for name, values in block.items()}
        added["model.mtp_linear_proj.0.weight"] = matrix(*wide)
        added |= {f"model.mtp_{name}_norm.0.weight": norm for name in ("emb", "hidden")}
    elif kind == "mimo":
        added = {f"model.mtp_layers.0.{name}": values for name, values in block.items()}
        added["model.mtp_layers.0.input_proj.weight"] = matrix(*wide)
        added |= {f"model.mtp_layers.0.{name}_layernorm.weight": norm for name in ("token", "hidden", "final")}
    elif kind.startswith(("qwen3", "exaone")):
        added = {f"mtp.layers.0.{name}": values for name, values in block.items()}
        added["mtp.fc.weight"] = matrix(*wide)
        added |= {f"mtp.{name}.weight": norm for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
        text["mtp_num_hidden_layers"] = 1
    else:
        added = {f"model.layers.{layers}.{name}": values for name, values in block.items()}
        own = {"eh_proj": matrix(*wide), "enorm": norm, "hnorm": norm, "shared_head.norm": norm,
               "shared_head.head": matrix(rows, hidden), "embed_tokens": matrix(rows, hidden)}  # fmt: skip
        added |= {f"model.layers.{layers}.{name}.weight": values for name, values in own.items()}
    text["num_nextn_predict_layers"] = 1
    change(folder, tensors | added, config)
    return folder


def convert(source: Path, *options: str) -> Path:
    """Convert in a process of its own: vLLM's search for kernels in loaded modules fails on llvmlite's."""
    out = source.with_name(f"{source.name}-out")
    result = command("convert", source, out, *options)
    assert result.returncode == 0, result.stderr
    return out


def call_it_mimo(folder: Path) -> None:
    """Make a Qwen2 model one of MiMo, whose config class is remote code: it is Qwen2's."""
    from transformers import AutoConfig, Qwen2Config

    AutoConfig.register("mimo", type("MiMoConfig", (Qwen2Config,), {"model_type": "mimo"}), exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mimo", "architectures": ["MiMoForCausalLM"]}
    change(folder, load_file(folder / "model.safetensors"), config)


DRAFTERS = [
    "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "ernie4_5_moe", "mimo", "qwen3_5", "qwen3_5_moe",
    "qwen3_next",
]  # fmt: skip


@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_drafter_loads_as_it_was(kind: str, tmp_path: Path) -> None:
    source = with_drafter(tiny("qwen2" if kind == "mimo" else kind, tmp_path / "source"), kind)
    if kind == "mimo":
        call_it_mimo(source)
    expected = load(source, drafter=True)
    found = load(convert(source), drafter=True)
    assert found.keys() == expected.keys()
    assert not unfilled(found)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_equal_to_twin(out: Path, plain: Path, folder: Path) -> None:
    """Compare every parameter of the model that vLLM builds with that of the bfloat16 twin, bit for bit."""
    parameters = load(out)
    packed = [name for name in parameters if name.endswith("weight_packed")]
    assert packed
    assert not unfilled(parameters)
    found, expected = weights(parameters), load(write_twin(out, plain, folder, stacked=False))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def fp8_blocks(weight: torch.Tensor) -> Tensors:
    """Return codes and scales of a matrix as DeepSeek-V3 stores them, one scale for 128 x 128 values."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scales = torch.rand(rows, columns) * 0.001 + 0.0001
    spread = scales.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return {"weight": (weight.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


def int4_groups(weight: torch.Tensor) -> Tensors:
    """Return codes and scales of a matrix as Kimi-K2.x stores them, one scale for 32 columns."""
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, -1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-6).to(torch.bfloat16)
    codes = (groups / scale.float()).round().clamp(-8, 7).to(torch.int32).reshape(rows, -1, 8) + 8
    words = (codes << (4 * torch.arange(8, dtype=torch.int32))).sum(-1).to(torch.int32)
    return {"weight_packed": words, "weight_scale": scale.squeeze(-1), "weight_shape": torch.tensor([rows, columns])}


def mxfp4_groups(weight: torch.Tensor) -> Tensors:
    """Return codes and exponents of a matrix as compressed-tensors stores MXFP4, one exponent for 32 columns."""
    rows, columns = weight.shape
    exponents = torch.randint(116, 121, (rows, columns // 32), dtype=torch.uint8)
    return {"weight_packed": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8), "weight_scale": exponents}


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
MXFP4 = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
}
RELEASES = {
    "fp8": (fp8_blocks, "_proj.weight", {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}),
    "int4": (int4_groups, ".experts.", {"quant_method": "compressed-tensors", "format": "pack-quantized",
                                        "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}}}),
    "mxfp4": (mxfp4_groups, ".experts.", {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized",
                                          "config_groups": {"group_0": {"targets": ["Linear"], "weights": MXFP4}}}),
}  # fmt: skip


@pytest.mark.parametrize("form", RELEASES)
def test_a_small_release_in_codes_loads_as_its_bf16_twin(form: str, tmp_path: Path) -> None:
    """DeepSeek-V3 in FP8, Kimi-K2.x (the same classes) with experts in INT4, and with experts in MXFP4."""
    encode, mark, quantization = RELEASES[form]
    plain = tiny("deepseek_v3", tmp_path / "plain")
    tensors, config = load_file(plain / "model.safetensors"), json.loads((plain / "config.json").read_text())
    stored: Tensors = {}
    for name, values in tensors.items():
        coded = encode(values) if mark in name and values.dim() == 2 else {"weight": values}
        parent = name.removesuffix(".weight")
        stored |= {f"{parent}.{leaf}": each for leaf, each in coded.items()} if len(coded) > 1 else {name: values}
    source = tmp_path / "source"
    source.mkdir()
    change(source, stored, config | {"quantization_config": quantization})
    assert_equal_to_twin(convert(source, "--method", "minmax"), plain, tmp_path / "twin")


@pytest.mark.parametrize("kind", ["granitemoe", "granitemoehybrid", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe"])
def test_fused_parameters_are_those_of_the_twin(kind: str, tmp_path: Path) -> None:
    source = tiny(kind, tmp_path / "source")
    assert_equal_to_twin(convert(source), source, tmp_path / "twin")
