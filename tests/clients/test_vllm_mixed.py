"""Mixed checkpoints in vLLM: FP8 beside NVFP4, by its own config parsing, name matching, loader and fusing.

As in `test_vllm`: kernels that this CPU lacks are replaced by ones that dequantize, and the log-probabilities must be exactly
those of the BF16 twin.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file, save_file

from tests.clients.dequantize import write_twin
from tests.clients.test_vllm import (
    SCHEMES,
    LinearKernel,
    difference,
    kernels,  # noqa: F401 - a fixture
    log_probabilities,
    models,  # noqa: F401 - a fixture
)
from tests.clients.test_vllm_loading import fp8_blocks
from tests.conftest import command
from tests.models import DENSE, MOE, write_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
ATTENTION = r"re:.*(self_attn|linear_attn)\..*"
HEAD = "re:.*lm_head$"
CODED = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "o_proj.weight",
    "in_proj_qkv.weight",
    "in_proj_z.weight",
    "out_proj.weight",
)
RECIPES = {
    "attention and head": (["--fp8", ATTENTION, "--fp8", HEAD], DENSE),
    "some layers": (["--fp8", r"re:.*layers\.[01]\.mlp\..*", "--format", f"fp8-block={ATTENTION}"], DENSE),
    "experts NVFP4, rest FP8": (["--fp8", ATTENTION, "--fp8", r"re:.*shared_expert\..*", "--fp8", HEAD], MOE),
    "experts FP8, attention NVFP4": (["--fp8", r"re:.*mlp\.experts\..*"], MOE),
    "all FP8": (["--fp8", "re:.*", "--fp8", HEAD], DENSE),
}


def fp8_weight(layer: torch.nn.Module, name: str = "weight") -> torch.nn.Parameter:
    """Return the BF16 weight of FP8 codes and scales as vLLM has loaded them."""
    codes, scale = getattr(layer, name).data.float(), getattr(layer, f"{name}_scale").data.float()
    if layer.weight_block_size is not None:
        scale = scale.repeat_interleave(128, -2)[..., : codes.shape[-2], :]
        scale = scale.repeat_interleave(128, -1)[..., : codes.shape[-1]]
    return torch.nn.Parameter((codes * scale).to(torch.bfloat16), requires_grad=False)


class Fp8Scheme:
    """What takes the place of a scheme's kernel. `layers` counts how often it was chosen."""

    layers = 0

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.weight = fp8_weight(layer)
        Fp8Scheme.layers += 1

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight, bias)


def experts_method() -> type:
    """Return vLLM's method for FP8 experts with an unquantized one behind it."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8 as fp8,
    )

    class ExpertsMethod(UnquantizedFusedMoEMethod):
        layers = 0
        weight_block_size, block_quant, static_input_scales = None, False, False

        def __init__(self, weight_quant, input_quant, moe, layer_name: str | None = None) -> None:
            super().__init__(moe)
            self.weight_quant, self.input_quant = weight_quant, input_quant

        create_weights = fp8.CompressedTensorsW8A8Fp8MoEMethod.create_weights

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            for name in ("w13_weight", "w2_weight"):
                weight = fp8_weight(layer, name)
                delattr(layer, name)
                layer.register_parameter(name, weight)
            super().process_weights_after_loading(layer)
            ExpertsMethod.layers += 1

    return ExpertsMethod


@pytest.fixture
def fp8_kernels(kernels: type, monkeypatch: pytest.MonkeyPatch) -> type:  # noqa: F811
    """Put in the FP8 kernels for this CPU, beside those for NVFP4; returns the experts' one."""
    for name, kernel in (("w8a16_fp8.CompressedTensorsW8A16Fp8", "init_wfp8_a16_linear_kernel"),
                         ("w8a8_fp8.CompressedTensorsW8A8Fp8", "init_fp8_linear_kernel")):  # fmt: skip
        scheme = f"{SCHEMES}.schemes.compressed_tensors_{name}"
        monkeypatch.setattr(f"{scheme.rpartition('.')[0]}.{kernel}", lambda *_, **__: LinearKernel())
        for method in ("process_weights_after_loading", "apply_weights"):
            monkeypatch.setattr(f"{scheme}.{method}", getattr(Fp8Scheme, method))
    experts = experts_method()
    module = f"{SCHEMES}.compressed_tensors_moe.compressed_tensors_moe_w8a8_fp8"
    monkeypatch.setattr(f"{module}.CompressedTensorsW8A8Fp8MoEMethod", experts)
    monkeypatch.setattr(Fp8Scheme, "layers", 0)
    return experts


def make(folder: Path, name: str) -> tuple[Path, Path]:
    options, kind = RECIPES[name]
    source, out = write_checkpoint(folder / "source", kind, "apart"), folder / "out"
    result = command("convert", source, out, *options)
    assert result.returncode == 0, result.stderr
    return source, out


@pytest.mark.parametrize("name", RECIPES)
def test_mixed_formats_equal_the_bf16_twin(name: str, tmp_path: Path, fp8_kernels: type, kernels: type) -> None:  # noqa: F811
    source, out = make(tmp_path, name)
    converted = log_probabilities(out)
    counts = (Fp8Scheme.layers, fp8_kernels.layers, LinearKernel.layers, kernels.layers)
    exact = log_probabilities(write_twin(out, source, tmp_path / "twin"))
    original = log_probabilities(source)
    print(
        f"\n{name}: {len(converted)} log-probabilities; layers: FP8 {counts[:2]}, NVFP4 {counts[2:]} (linear, experts)"
    )
    print(
        f"largest difference to the BF16 twin: {difference(converted, exact)}, to the source: {difference(converted, original)}"
    )
    layers = 4
    assert (
        counts
        == {
            "attention and head": (2 * layers + 1, 0, 2 * layers, 0),
            "some layers": (2 * layers + 4, 0, 4, 0),
            "experts NVFP4, rest FP8": (4 * layers + 1, 0, 0, layers),
            "experts FP8, attention NVFP4": (0, layers, 4 * layers, 0),
            "all FP8": (4 * layers + 1, 0, 0, 0),
        }[name]
    )
    assert len(converted) == len(exact)
    assert difference(converted, exact) == 0.0
    assert difference(converted, original) > 0.001


def test_literal_targets_mean_the_same(tmp_path: Path, fp8_kernels: type) -> None:
    source, out = make(tmp_path, "attention and head")
    config = json.loads((out / "config.json").read_text())
    names = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for group in config["quantization_config"]["config_groups"].values():
        packed = ".weight_packed" if group["format"].startswith("nvfp4") else ".weight_scale"
        other = {name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")}
        modules = {name.removesuffix(packed) for name in names if name.endswith(packed)}
        modules -= other if packed == ".weight_scale" else set()
        head = [each for each in group["targets"] if "lm_head" in each]
        group["targets"] = [*head, *sorted(modules - {"lm_head"})]
    (out / "config.json").write_text(json.dumps(config))
    assert difference(log_probabilities(out), log_probabilities(write_twin(out, source, tmp_path / "twin"))) == 0.0
    assert Fp8Scheme.layers == 9


def fp8_release(source: Path, folder: Path) -> Path:
    """Write a checkpoint again with its attention in FP8, as releases of Qwen in FP8 store it."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        tensors = {}
        for name, values in load_file(file).items():
            if values.dim() == 2 and re.match(ATTENTION.removeprefix("re:"), name) and name.endswith(CODED):
                tensors |= {f"{name.removesuffix('weight')}{leaf}": each for leaf, each in fp8_blocks(values).items()}
            else:
                tensors[name] = values
        save_file(tensors, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    places = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_layers_that_stay_fp8_load_as_they_were(tmp_path: Path, fp8_kernels: type) -> None:
    source = write_checkpoint(tmp_path / "source", DENSE, "apart")
    release, out = fp8_release(source, tmp_path / "release"), tmp_path / "out"
    result = command("convert", release, out, "--ignore", ATTENTION)
    assert result.returncode == 0, result.stderr
    before, after = ({name: each for file in path.glob("*.safetensors") for name, each in load_file(file).items()}
                     for path in (release, out))  # fmt: skip
    kept = [name for name in before if name.endswith(CODED) and f"{name}_scale_inv" in before]
    assert kept
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in kept)
    converted = log_probabilities(out)
    assert Fp8Scheme.layers == 8
    assert difference(converted, log_probabilities(write_twin(out, source, tmp_path / "twin"))) == 0.0
