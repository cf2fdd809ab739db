"""What an `input_scale` means is told by the tensors beside it; configs only where these do not tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mfptq.errors import ScaleError
from mfptq.scales.reading import read_input_scales

SCALE = {"m.input_scale": torch.tensor(0.25)}
NVFP4 = SCALE | {
    "m.weight": torch.zeros(16, 8, dtype=torch.uint8),
    "m.weight_scale": torch.zeros(16, 1, dtype=torch.float8_e4m3fn),
    "m.weight_scale_2": torch.tensor(0.1),
}
FP8 = SCALE | {"m.weight": torch.zeros(16, 16, dtype=torch.float8_e4m3fn), "m.weight_scale": torch.tensor(0.1)}
STACK = {
    "m_input_scale": torch.tensor(0.25),
    "m": torch.zeros(2, 16, 8, dtype=torch.uint8),
    "m_weight_scale_2": torch.tensor(0.1),
}


def read(folder: Path, tensors: dict, config: dict, hf: dict | None = None) -> list[float]:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if hf is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": hf}))
    found = read_input_scales(folder)
    return list(found.global_scales.values())


FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
NVFP4_CONFIG = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
W4A8 = {"quant_algo": "W4A8_NVFP4_FP8"}


@pytest.mark.parametrize(
    ("tensors", "config", "hf", "expected"),
    [
        (NVFP4, {}, None, 4.0),
        (NVFP4, FP8_CONFIG, {"quant_algo": "NVFP4"}, 4.0),
        (NVFP4, FP8_CONFIG, None, 4.0),
        (NVFP4, {"a": {"b": FP8_CONFIG}}, None, 4.0),
        (NVFP4, FP8_CONFIG, W4A8, 24.0),
        (NVFP4, {"quantization_config": {"quant_algo": "MIXED_PRECISION"}}, None, 4.0),
        (STACK, FP8_CONFIG, None, 4.0),
        (FP8, {}, None, 24.0),
        (FP8, NVFP4_CONFIG, None, 24.0),
        (SCALE, {"llm_config": NVFP4_CONFIG}, None, 4.0),
        (SCALE, FP8_CONFIG, {"quant_algo": "FP8"}, 24.0),
    ],
)
def test_tensors_come_first(tensors, config, hf, expected, tmp_path: Path) -> None:
    assert read(tmp_path / "m", tensors, config, hf) == [expected]


@pytest.mark.parametrize(("tensors", "config"), [(SCALE, FP8_CONFIG), (NVFP4, NVFP4_CONFIG)])
def test_configs_that_disagree_where_tensors_do_not_tell_are_named(tensors, config, tmp_path: Path) -> None:
    other = {"quant_algo": "NVFP4"} if tensors is SCALE else W4A8
    with pytest.raises(ScaleError, match=r"config.json: quantization_config says '.*', hf_quant_config.json says '.*'"):
        read(tmp_path / "m", tensors, config, other)


@pytest.mark.parametrize("leaf", ["activation_scale", "act_scale"])
def test_other_names_of_static_fp8_scales(leaf: str, tmp_path: Path) -> None:
    tensors = {name.replace("input_scale", leaf): value for name, value in FP8.items()}
    assert read(tmp_path / "m", tensors, {}) == [24.0]
