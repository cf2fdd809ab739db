"""vLLM's own config parsing, name mapping, loader and fusing, judged by log-probabilities.

vLLM has no NVFP4 kernel for CPUs: the test puts in one that dequantizes, then goes on as for unquantized weights. The
converted checkpoint must give exactly what its BF16 twin gives, the same model with the dequantized weights stored as BF16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the kernels put in here must reach the engine
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file, save_file

from tests.clients.dequantize import E2M1, write_twin
from tests.conftest import command
from tests.models import DENSE, MOE, write_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
PROMPTS = [list(range(start, start + 40)) for start in (1, 60, 130)]
SCHEMES = "vllm.model_executor.layers.quantization.compressed_tensors"


@pytest.fixture(scope="module", autouse=True)
def models() -> Iterator[None]:
    """Import and register the models here: vLLM would do it in a process that cannot be prepared for its imports.

    torchvision's operators are missing where it was built for another torch than the one installed; vLLM's models import
    it for images, which no test here uses.
    """
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from vllm import ModelRegistry
    from vllm.model_executor.models import qwen3_5

    for name in ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"):
        ModelRegistry.register_model(name, getattr(qwen3_5, name))
    yield
    operators._destroy()


def dequantize(packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.nn.Parameter:
    """Return the BF16 weight of what vLLM holds after loading: `global_scale` is its factor, no longer a divisor."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
    weight = torch.from_numpy(E2M1)[nibbles] * (scale.float() * global_scale).repeat_interleave(16, -1)
    return torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)


class LinearKernel:
    """What a GPU kernel computes, in two steps. `layers` counts how often it was chosen."""

    layers = 0

    def input_quant_key(self) -> None:
        """Activations are not quantized here."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.weight = dequantize(layer.weight.data, layer.weight_scale.data, layer.weight_global_scale.data)
        LinearKernel.layers += 1

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight, bias)


def experts_method() -> type:
    """Return vLLM's method for NVFP4 experts with an unquantized one behind it; `layers` counts how often it was used."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as nvfp4,
    )

    class ExpertsMethod(UnquantizedFusedMoEMethod):
        layers = 0
        use_a16 = True
        group_size = 16

        def __init__(self, moe, layer_name: str | None = None, use_a16: bool = False) -> None:
            super().__init__(moe)
            assert use_a16

        create_weights = nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod.create_weights

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            divisors = layer.w13_weight_global_scale.data
            assert torch.equal(divisors[:, 0], divisors[:, 1])  # vLLM takes the first for both
            for name, divisor in (("w13", divisors[:, 0]), ("w2", layer.w2_weight_global_scale.data)):
                packed, scale = (getattr(layer, f"{name}_weight_{part}").data for part in ("packed", "scale"))
                weight = dequantize(packed, scale, (1 / divisor)[:, None, None])
                delattr(layer, f"{name}_weight_packed")
                layer.register_parameter(f"{name}_weight", weight)
            super().process_weights_after_loading(layer)
            ExpertsMethod.layers += 1

    return ExpertsMethod


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> type:
    """Put in the kernels for this CPU; returns the experts' one."""
    experts = experts_method()
    linear = f"{SCHEMES}.schemes.compressed_tensors_w4a4_nvfp4.init_nvfp4_linear_kernel"
    monkeypatch.setattr(linear, lambda *_, **__: LinearKernel())
    module = f"{SCHEMES}.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4"
    monkeypatch.setattr(f"{module}.CompressedTensorsW4A4Nvfp4MoEMethod", experts)
    monkeypatch.setattr(LinearKernel, "layers", 0)
    return experts


def convert_tiny(folder: Path, kind: str, method: str = "search") -> tuple[Path, Path]:
    """Return a source whose fused partners lie in different shards, and its conversion."""
    source, out = write_checkpoint(folder / "source", kind, "apart"), folder / "out"
    # In a process of its own: vLLM's search for kernels in loaded modules fails on llvmlite's.
    result = command("convert", source, out, "--method", method)
    assert result.returncode == 0, result.stderr
    return source, out


def log_probabilities(folder: Path) -> list[float]:
    """Return log-probabilities of the prompts' tokens, of the best ones beside them, and of a few steps after."""
    from vllm import LLM, SamplingParams

    model = LLM(
        str(folder), dtype="bfloat16", max_model_len=128, enforce_eager=True, skip_tokenizer_init=True, seed=0,
        max_num_seqs=4, limit_mm_per_prompt={"image": 0, "video": 0}, enable_prefix_caching=False,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=1, logprobs=1, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling)
    found = []
    for output in outputs:
        steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        found += [entry.logprob for step in steps for _, entry in sorted(step.items())]
    return found


def difference(one: list[float], other: list[float]) -> float:
    """Return the largest difference; the best tokens may be others, which may change how many are listed."""
    return max(abs(a - b) for a, b in zip(one, other, strict=False))


@pytest.mark.parametrize(("kind", "method"), [(DENSE, "search"), (DENSE, "minmax"), (MOE, "search")])
def test_split_layout_equals_its_bf16_twin(kind: str, method: str, tmp_path: Path, kernels: type) -> None:
    source, out = convert_tiny(tmp_path, kind, method)
    converted = log_probabilities(out)
    layers = json.loads((source / "config.json").read_text())["text_config"]["num_hidden_layers"]
    # qkv or qkvz, out, gate_up, down; the last two are the shared expert's in a mixture of experts
    assert LinearKernel.layers == 4 * layers
    assert kernels.layers == (layers if kind == MOE else 0)

    exact = log_probabilities(write_twin(out, source, tmp_path / "twin"))
    original = log_probabilities(source)
    print(f"\n{kind}, {method}: {len(converted)} log-probabilities")
    print(f"largest difference to the BF16 twin: {difference(converted, exact)}")
    print(f"largest difference to the source: {difference(converted, original)}")
    assert len(converted) == len(exact)
    assert difference(converted, exact) == 0.0
    assert difference(converted, original) > 0.01


def test_partners_with_scales_of_their_own_would_be_noticed(tmp_path: Path, kernels: type) -> None:
    source, out = convert_tiny(tmp_path, DENSE)
    name = "model.language_model.layers.0.linear_attn.in_proj_z.weight_global_scale"
    shard = out / json.loads((out / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    save_file({**tensors, name: tensors[name] * 2}, shard, {"format": "pt"})
    assert difference(log_probabilities(out), log_probabilities(write_twin(out, source, tmp_path / "twin"))) > 0.01


@pytest.mark.parametrize("entries", ["all", "regexes"])
@pytest.mark.parametrize("kind", [DENSE, MOE])
def test_ignore_list_means_to_vllm_what_the_tensors_say(kind: str, entries: str, tmp_path: Path) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
    from vllm.model_executor.models import qwen3_5

    _, out = convert_tiny(tmp_path, kind)
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    if entries == "regexes":
        quantization["ignore"] = [entry for entry in quantization["ignore"] if entry.startswith("re:")]
    model = getattr(qwen3_5, f"Qwen3_5{'Moe' if kind == MOE else ''}ForConditionalGeneration")
    config = CompressedTensorsConfig.from_config(quantization)
    config.apply_vllm_mapper(model.hf_to_vllm_mapper)

    def ignored(name: str) -> bool:
        return should_ignore_layer(name, config.ignore, model.packed_modules_mapping)

    layers = "language_model.model.layers."
    kept = ["language_model.lm_head", "visual.blocks.0.attn.qkv", "visual.merger.linear_fc1", "mtp.fc"]
    kept += ["mtp.layers.0.self_attn.qkv_proj", "mtp.layers.0.self_attn.o_proj", f"{layers}0.linear_attn.in_proj_ba"]
    fused = [f"{layers}0.linear_attn.in_proj_qkvz", f"{layers}0.linear_attn.out_proj", f"{layers}3.self_attn.qkv_proj"]
    if kind == DENSE:
        kept += ["mtp.layers.0.mlp.gate_up_proj"]
        fused += [f"{layers}0.mlp.gate_up_proj", f"{layers}0.mlp.down_proj"]
    else:
        kept += [f"{layers}0.mlp.gate", f"{layers}0.mlp.shared_expert_gate", "mtp.layers.0.mlp.experts.0.gate_proj"]
        fused += [f"{layers}0.mlp.shared_expert.gate_up_proj", f"{layers}0.mlp.experts.0.gate_proj"]
    assert [name for name in kept if not ignored(name)] == []
    assert [name for name in fused if ignored(name)] == []


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_the_demo_is_served_with_its_own_tokenizer(kind: str, tmp_path: Path, kernels: type) -> None:
    from vllm import LLM, SamplingParams

    result = command("demo", tmp_path / "demo")
    assert result.returncode == 0, result.stderr
    model = LLM(
        str(tmp_path / "demo" / f"{kind}-NVFP4"), max_model_len=128, enforce_eager=True, seed=0, max_num_seqs=4,
        enable_prefix_caching=False,
    )  # fmt: skip
    [answer] = model.generate(["Hello"], SamplingParams(max_tokens=4, temperature=0))
    assert len(answer.prompt_token_ids) == len("Hello")
    assert len(answer.outputs[0].token_ids) == 4
    assert LinearKernel.layers == 4 * 4
