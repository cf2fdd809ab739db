"""Input scales without calibration: bounds that no input passes, found only where structure is certain of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mfptq
from mfptq.calibration.reading import load_calibration
from mfptq.cli.main import main
from mfptq.errors import UsageError
from mfptq.hub.opening import open_checkpoint
from mfptq.names.fusion import FusedGroup
from mfptq.scales.uncalibrated import CONSTANT, HIGHEST, LOWEST, UncalibratedInputs

from ..calibration.files import calibrate, stored
from ..clients.dequantize import read_tensors

LAYER = "model.layers.3"
WIDTH = 64


def checkpoint(folder: Path, model_type: str, norms: dict[str, torch.Tensor]) -> UncalibratedInputs:
    folder.mkdir()
    save_file(
        {f"{LAYER}.{name}.weight": tensor for name, tensor in norms.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return UncalibratedInputs(open_checkpoint(folder))


def groups(*names: str) -> list[FusedGroup]:
    return [FusedGroup(f"{LAYER}.{name}", (f"{LAYER}.{name}",)) for name in names]


def scales(inputs: UncalibratedInputs, *names: str) -> list[float]:
    found = inputs.of(groups(*names)).global_scales
    inputs.checkpoint.source.close()
    return [found[f"{LAYER}.{name}"] for name in names]


def gamma(largest: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    values = torch.full((WIDTH,), 0.5)
    values[7] = -largest
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_bounds_what_it_feeds(dtype, tmp_path):
    """At most |gamma| times the root of the width: 10.5 * 8 = 84, so 2688 / 84 = 32."""
    inputs = checkpoint(tmp_path / "m", "llama", {"input_layernorm": gamma(10.5, dtype)})
    assert scales(inputs, "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj") == [32.0, CONSTANT, CONSTANT]


def test_norms_that_add_one_are_known(tmp_path):
    norms = {"post_attention_layernorm": gamma(0), "pre_feedforward_layernorm": gamma(-9.5)}
    assert scales(checkpoint(tmp_path / "a", "gemma3_text", norms), "mlp.up_proj") == [32.0]
    assert scales(
        checkpoint(tmp_path / "b", "qwen3_next", norms), "mlp.experts.7.up_proj", "mlp.shared_expert.gate_proj"
    ) == [128.0, 128.0]


def test_other_models_get_the_constant(tmp_path):
    inputs = checkpoint(tmp_path / "m", "somebodys", {"input_layernorm": gamma(1)})
    assert scales(inputs, "self_attn.q_proj") == [CONSTANT]


@pytest.mark.parametrize(("largest", "expected"), [(0.6, 512.0), (0.2, 512.0), (41.9, 8.0), (42.1, 4.0), (1e6, LOWEST)])
def test_scales_are_powers_of_two_within_limits(largest, expected, tmp_path):
    inputs = checkpoint(tmp_path / "m", "llama", {"input_layernorm": gamma(largest, torch.float32)})
    [found] = scales(inputs, "self_attn.k_proj")
    assert found == expected
    assert LOWEST <= found <= HIGHEST


def test_a_norm_of_nothing_gives_the_highest(tmp_path):
    inputs = checkpoint(tmp_path / "m", "llama", {"input_layernorm": torch.zeros(WIDTH)})
    assert scales(inputs, "self_attn.k_proj") == [HIGHEST]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_norms_bound_nothing(value, tmp_path):
    norm = torch.ones(WIDTH)
    norm[3] = value
    assert scales(checkpoint(tmp_path / "m", "llama", {"input_layernorm": norm}), "self_attn.v_proj") == [CONSTANT]


def test_no_output_of_a_norm_passes_its_bound(tmp_path):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    generator = torch.Generator().manual_seed(0)
    for number, (norm_class, model_type) in enumerate([(LlamaRMSNorm, "llama"), (Gemma3RMSNorm, "gemma3_text")]):
        norm = norm_class(WIDTH)
        norm.weight.data = torch.randn(WIDTH, generator=generator) * 8
        inputs = checkpoint(tmp_path / str(number), model_type, {"input_layernorm": norm.weight.data})
        [scale] = scales(inputs, "self_attn.q_proj")
        spikes = torch.eye(WIDTH) * 1000  # all of a token's energy in one channel: the worst case
        largest = norm(spikes).abs().max().item()
        assert largest <= 2688 / scale < 2.01 * largest


def test_a_conversion_says_that_its_scales_are_uncalibrated(source, tmp_path, capsys):
    report = mfptq.convert(source, tmp_path / "out", input_scales="auto")
    assert report.scheme == "NVFP4"
    [warning] = [line for line in report.warnings if "uncalibrated" in line]
    assert "bounded by the norm before them, 4 for the others" in warning
    assert mfptq.verify(tmp_path / "out", source).ok
    about = json.loads((tmp_path / "out" / "mfptq_report.json").read_text())["input_scales"]
    assert about in warning
    assert about in (tmp_path / "out" / "README.md").read_text()
    found = {
        name: float(each.values[0])
        for name, each in read_tensors(tmp_path / "out").items()
        if name.endswith("input_global_scale")
    }
    assert {np.log2(value) % 1 for value in found.values()} == {0.0}
    assert any(value == CONSTANT for value in found.values())
    assert any(value > CONSTANT for name, value in found.items() if "q_proj" in name)
    main.main(["plan", str(source), "--input-scales", "auto"], standalone_mode=False)
    assert warning in " ".join(capsys.readouterr().out.split())  # lines of a plan are wrapped


def test_weights_do_not_depend_on_it(source, tmp_path):
    mfptq.convert(source, tmp_path / "auto", input_scales="auto")
    mfptq.convert(source, tmp_path / "none")
    one, other = stored(tmp_path / "auto"), stored(tmp_path / "none")
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in other)


def test_a_margin_never_goes_below_two(source, tmp_path):
    path = calibrate(source, tmp_path / "a.calibration.safetensors")
    tensors = load_file(path)
    wide = dict(zip([name for name in tensors if name.endswith(".amax")], (300.0, 1000.0, 1500.0), strict=False))
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors | {name: torch.tensor([value]) for name, value in wide.items()}, path, metadata)
    calibration = load_calibration(path)
    found = calibration.input_scales(4.0)
    by_input = {info.name: found.global_scales[info.modules[0]] for info in calibration.inputs.values()}
    calibration.close()
    assert [round(by_input[name.removesuffix(".amax")], 3) for name in wide] == [2.24, 2.0, 1.792]
    assert found.about == "taken from a calibration file, with a margin of 4"


@pytest.mark.parametrize("margin", [0.5, 65, float("nan")])
def test_margins_are_checked(margin, source, tmp_path):
    path = calibrate(source, tmp_path / "a.calibration.safetensors")
    with pytest.raises(UsageError, match="expected a number from 1 to 64"):
        mfptq.plan(source, calibration=path, input_margin=margin)
    with pytest.raises(UsageError, match="input_margin widens the ranges of a calibration file"):
        mfptq.plan(source, input_margin=margin)


def test_ranges_of_other_tools_stay_as_they_are(source, tmp_path):
    path = calibrate(source, tmp_path / "a.calibration.safetensors")
    mfptq.convert(source, tmp_path / "theirs", calibration=path, input_margin=1, smooth=False)
    extracted = tmp_path / "b.calibration.safetensors"
    mfptq.extract_scales(tmp_path / "theirs", extracted)
    mfptq.convert(source, tmp_path / "out", calibration=extracted)
    one, other = stored(tmp_path / "theirs"), stored(tmp_path / "out")
    names = [name for name in one if name.endswith("input_global_scale")]
    assert names
    assert all(torch.equal(one[name], other[name]) for name in names)
