"""transformers loads a converted DeepSeek-V4 under its own names: all but routed experts, which it reads in bfloat16 only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers.models.deepseek_v4")

import mfptq
from tests.clients.deepseek_v4 import CONFIG, QUANTIZATION, release
from tests.clients.dequantize import write_twin
from tests.clients.vllm_loading import weights
from tests.encodings.checkpoints import write

pytestmark = pytest.mark.filterwarnings("ignore")


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Load a checkpoint as a user would, and return its parameters, NVFP4 as what it stands for."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    return weights({name: parameter.data for name, parameter in model.named_parameters()})


def test_every_parameter_but_those_of_experts_is_the_twins(tmp_path: Path) -> None:
    stored, cast = release()
    source = write(tmp_path / "source", stored, config=CONFIG | {"quantization_config": QUANTIZATION})
    plain = write(
        tmp_path / "plain", cast, config={key: value for key, value in CONFIG.items() if key != "expert_dtype"}
    )
    mfptq.convert(source, tmp_path / "out")
    found = load(tmp_path / "out")
    expected = load(write_twin(tmp_path / "out", plain, tmp_path / "twin", stacked=False))
    assert found.keys() == expected.keys()
    assert [
        name for name in expected if ".mlp.experts." not in name and not torch.equal(found[name], expected[name])
    ] == []
    released = load(plain)
    changed = {
        name.split(".")[-2]
        for name in released
        if ".mlp.experts." not in name and not torch.equal(found[name], released[name])
    }
    assert changed == {"q_a_proj", "q_b_proj", "kv_proj", "o_b_proj", "gate_proj", "up_proj", "down_proj"}
