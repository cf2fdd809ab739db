"""Mixed dense checkpoints in transformers: every tensor finds its place, and weights are decoded exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.clients.test_transformers import convert_tiny, difference, load, logits
from tests.models import DENSE

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
    assert len(decoded) == 50
    for name, module in decoded.items():
        assert torch.equal(module.weight, weights[f"{name}.weight"]), name
    assert difference(with_inputs, exact) > 0, "transformers imitates inputs of 8 bits"

    config = json.loads((made.quantized / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (made.quantized / "config.json").write_text(json.dumps(config))
    assert difference(logits(load(made.quantized)), exact) == 0.0
