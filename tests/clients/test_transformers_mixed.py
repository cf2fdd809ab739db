"""Mixed dense checkpoints in transformers: every tensor finds its place, and weights are decoded exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mfptq
from tests.clients.dequantize import write_twin
from tests.clients.test_transformers import convert_tiny, difference, load, logits
from tests.encodings.checkpoints import fp8_block, int4
from tests.models import DENSE, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
ATTENTION = r"re:.*(self_attn|linear_attn)\..*"


@pytest.mark.parametrize("target", ["fp8-dynamic", "fp8-block"])
def test_weights_are_those_of_the_twin_and_so_are_logits_without_quantized_inputs(target: str, tmp_path: Path) -> None:
    made = convert_tiny(tmp_path, DENSE, "apart", method="minmax", formats=[f"{target}={ATTENTION}"])
    twin = load(made.twin)
    exact, weights = logits(twin), dict(twin.named_parameters())

    model = load(made.quantized)
    with_inputs = logits(model)
    decoded = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    assert len(decoded) == 25
    for name, module in decoded.items():
        assert torch.equal(module.weight, weights[f"{name}.weight"]), name
    assert difference(with_inputs, exact) > 0, "transformers imitates inputs of 8 bits"

    config = json.loads((made.quantized / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (made.quantized / "config.json").write_text(json.dumps(config))
    assert difference(logits(load(made.quantized)), exact) == 0.0


def blocks(values: torch.Tensor) -> dict[str, torch.Tensor]:
    made = fp8_block(values)
    return {"weight": made["weight"], "weight_scale_inv": made["scale"]}


def words(values: torch.Tensor) -> dict[str, torch.Tensor]:
    made = int4(values)
    return {"weight_packed": made["packed"], "weight_scale": made["scale"], "weight_shape": made["shape"]}


INT4 = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 32}}}}
RELEASES = {"FP8 in blocks": (blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}), "INT4": (words, INT4)}


@pytest.mark.parametrize("form", RELEASES)
def test_what_was_made_from_a_release_in_codes_loads_with_the_logits_of_its_twin(form: str, tmp_path: Path) -> None:
    encode, quantization = RELEASES[form]
    source = write_checkpoint(tmp_path / "source", DENSE, "apart")
    release, out = shutil.copytree(source, tmp_path / "release"), tmp_path / "out"
    places = {}
    for file in release.glob("*.safetensors"):
        tensors: dict[str, torch.Tensor] = {}
        for name, values in load_file(file).items():
            coded = "language_model.layers" in name and name.endswith("_proj.weight")
            parts = encode(values) if coded else {name.rpartition(".")[2]: values}
            tensors |= {f"{name.rpartition('.')[0]}.{leaf}": part.contiguous() for leaf, part in parts.items()}
        save_file(tensors, file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    (release / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = json.loads((source / "config.json").read_text())
    (release / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    assert mfptq.convert(release, out).scheme == "NVFP4A16"
    twin = write_twin(out, source, tmp_path / "twin")
    found = logits(load(out))
    assert difference(found, logits(load(twin))) == 0.0
    assert difference(found, logits(load(source))) > 0
