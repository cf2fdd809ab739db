"""vLLM's own config parsing, name mapping, loader and fusing, judged by log-probabilities.

vLLM has no NVFP4 kernel for CPUs: the test puts in one that dequantizes and calls `linear`. The converted checkpoint must then
give exactly what its bf16 twin gives, the same model with the dequantized weights stored as bf16.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the patch must reach the engine
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
pytest.importorskip("vllm")

import torch
from safetensors.torch import save_file

from tests.clients.test_transformers import VALUES, dequantized
from tests.conftest import command
from tests.models import DENSE, write_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
PROMPTS = [list(range(start, start + 40)) for start in (1, 60, 130)]


class DequantizingKernel:
    """What a GPU kernel computes, in two steps."""

    def input_quant_key(self) -> None:
        """Activations are not quantized here."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed = layer.weight.data
        nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
        scales = layer.weight_scale.data.float() * layer.weight_global_scale.data.float()
        weight = (VALUES[nibbles] * scales.repeat_interleave(16, 1)).to(torch.bfloat16)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layers_seen.append(tuple(weight.shape))

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight, bias)


layers_seen: list[tuple[int, ...]] = []


def write_twin(out: Path, source: Path, twin: Path) -> None:
    """Write the bf16 model whose weights are the dequantized ones."""
    twin.mkdir()
    for path in source.iterdir():
        if not path.name.endswith((".safetensors", ".index.json")):
            (twin / path.name).write_bytes(path.read_bytes())
    original = {}
    from tests.clients.test_transformers import load_all

    for name, tensor in load_all(source).items():
        original[name] = tensor
    exact = dequantized(out)
    save_file(
        {name: exact[name].to(tensor.dtype).contiguous() for name, tensor in original.items()},
        twin / "model.safetensors",
        {"format": "pt"},
    )


def log_probabilities(folder: Path) -> list[float]:
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


def test_dense_split_layout_equals_its_bf16_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a4_nvfp4

    monkeypatch.setattr(
        compressed_tensors_w4a4_nvfp4, "init_nvfp4_linear_kernel", lambda *_, **__: DequantizingKernel()
    )
    source = write_checkpoint(tmp_path / "source", DENSE, "apart")
    # in a process of its own: vLLM's search for kernels in loaded modules fails on llvmlite's
    assert command("convert", source, tmp_path / "out").returncode == 0
    write_twin(tmp_path / "out", source, tmp_path / "twin")
    converted = log_probabilities(tmp_path / "out")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    assert len(layers_seen) >= 4 * config["text_config"]["num_hidden_layers"]  # qkv or qkvz, out, gate_up, down
    exact = log_probabilities(tmp_path / "twin")
    difference = max(abs(a - b) for a, b in zip(converted, exact, strict=True))
    original = log_probabilities(source)
    print(f"\n{len(converted)} log-probabilities, largest difference to the bf16 twin: {difference}")
    print(f"largest difference to the source: {max(abs(a - b) for a, b in zip(converted, original, strict=False))}")
    assert difference == 0.0
