"""Sensitivities: how much a model's last hidden state changes where the layers of one input are rounded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import mfptq
from mfptq.calibration.file import CalibrationContents, write_calibration
from mfptq.calibration.merge import merge_calibrations
from mfptq.calibration.reading import load_calibration
from mfptq.errors import ScaleError
from mfptq.nvfp4 import dequantize
from mfptq.observation.sensitivity import TEXTS, TOKENS, rounded_weight, short_texts
from tests.conftest import sampled
from tests.models import DENSE, MOE, write_checkpoint

PARTS = {
    "layers.3.self_attn.o_proj": ("layers.3.self_attn.o_proj.weight",),
    "layers.0.linear_attn.in_proj_qkvz": (
        "layers.0.linear_attn.in_proj_qkv.weight",
        "layers.0.linear_attn.in_proj_z.weight",
    ),
    "layers.1.mlp.experts": ("layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"),
}


@pytest.fixture(scope="module", params=sampled([MOE], [DENSE]))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "source", request.param)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rng = np.random.default_rng(0)
    rows = [json.dumps({"input_ids": rng.integers(0, 256, 24).tolist()}) for _ in range(2)]
    path.write_text("\n".join(rows))
    return path


def calibrated(folder: Path, text: Path, output: Path, **options: object) -> dict[str, float]:
    mfptq.calibrate(
        folder, text, output, samples=2, statistics="moments", sensitivities=True, dtype="float32", **options
    )
    found = load_calibration(output)
    found.close()
    return dict(found.sensitivities)


@pytest.fixture(scope="module")
def file(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration file of the model, with sensitivities."""
    path = tmp_path_factory.mktemp("known") / "a.calibration.safetensors"
    calibrated(folder, text, path)
    return path


@pytest.fixture(scope="module")
def found(file: Path) -> dict[str, float]:
    """The sensitivities in it."""
    known = load_calibration(file)
    known.close()
    return dict(known.sensitivities)


def test_they_are_what_rounding_one_layer_does_to_the_model(
    folder: Path, text: Path, found: dict[str, float], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [torch.tensor([json.loads(line)["input_ids"]]) for line in text.read_text().splitlines()]

    def states() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model.model(ids).last_hidden_state[0] for ids in rows])

    exact, parameters = states(), dict(model.named_parameters())
    for name, parts in PARTS.items():
        known = [value for key, value in found.items() if key.endswith(name)]
        changed = [parameters[f"model.{part}"] for part in parts if f"model.{part}" in parameters]
        assert bool(known) == bool(changed)
        if not known:
            continue
        before = [parameter.detach().clone() for parameter in changed]
        for parameter in changed:
            parameter.data = rounded_weight(parameter.data, parameter.shape[-1])
        expected = ((states() - exact).square().sum(-1) / exact.square().sum(-1)).mean()
        for parameter, values in zip(changed, before, strict=True):
            parameter.data = values
        assert known == [pytest.approx(float(expected), rel=1e-3)]


def test_every_layer_has_one_and_streaming_finds_the_same(
    folder: Path, text: Path, file: Path, found: dict[str, float], tmp_path: Path
) -> None:
    with mfptq.plan(folder, calibration=file) as plan:
        calibration = plan._planned.calibration
        assert all(calibration.sensitivity(weight.module) > 0 for weight in plan._planned.weights())
    from mfptq.observation import calibration_pass, residency

    pushed = pytest.MonkeyPatch()
    pushed.setattr(calibration_pass, "choose_residency", lambda *_: residency.Residency(streamed=True, batch=1))
    try:
        assert calibrated(folder, text, tmp_path / "b.calibration.safetensors") == found
    finally:
        pushed.undo()


def test_statistics_do_not_count_the_text_of_the_sensitivities(
    folder: Path, text: Path, file: Path, tmp_path: Path
) -> None:
    mfptq.calibrate(
        folder, text, tmp_path / "b.calibration.safetensors", samples=2, statistics="moments", dtype="float32"
    )
    a, b = load_calibration(file), load_calibration(tmp_path / "b.calibration.safetensors")
    for name, info in a.inputs.items():
        assert a.read(info).tokens == b.read(b.inputs[name]).tokens
        np.testing.assert_array_equal(a.read(info).second_moment, b.read(b.inputs[name]).second_moment)
    assert not b.sensitivities
    a.close()
    b.close()


def test_only_the_beginnings_of_the_first_texts_are_read() -> None:
    texts = short_texts([np.arange(1000)] * 9)
    assert [len(ids) for ids in texts] == [TOKENS] * TEXTS


@pytest.mark.parametrize("shape", [(24, 32), (3, 8, 32)])
def test_rounding_is_that_of_plain_nvfp4(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rounded = rounded_weight(weight, 32).reshape(-1, 32)
    scale = 2688 / float(weight.abs().max())
    made = mfptq.quantize_nvfp4(weight.reshape(-1, 32), method="minmax", global_scale=scale)
    expected = dequantize(made.packed.numpy(), made.scale.view(torch.uint8).numpy(), made.global_scale)
    difference = (rounded.numpy() - expected).astype(np.float64)
    assert np.abs(difference).max() < 1e-5 * float(weight.abs().max())
    turned = rounded_weight(weight.reshape(-1, 32).T.contiguous(), 32) if len(weight.reshape(-1, 32)) != 32 else None
    assert turned is None or torch.equal(turned.T, rounded)
    with pytest.raises(ScaleError, match="expected 48 columns"):
        rounded_weight(weight, 48)


def test_a_merge_takes_means_and_what_cannot_be_is_refused(
    folder: Path, text: Path, file: Path, found: dict[str, float], tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(reversed(text.read_text().splitlines()[1:])))
    mfptq.calibrate(
        folder, other, tmp_path / "b.calibration.safetensors", samples=1, statistics="moments", dtype="float32",
        sensitivities=True,
    )  # fmt: skip
    merge_calibrations([file, tmp_path / "b.calibration.safetensors"], tmp_path / "c.safetensors")
    second, both = (
        load_calibration(tmp_path / "b.calibration.safetensors"),
        load_calibration(tmp_path / "c.safetensors"),
    )
    for name, value in both.sensitivities.items():
        assert value == pytest.approx((found[name] + second.sensitivities[name]) / 2, rel=1e-6)
    name = next(iter(found))
    contents = CalibrationContents(
        second.description, tuple(second.inputs.values()), second.read, second.routed(), {name: -1.0}
    )
    write_calibration(tmp_path / "bad.safetensors", contents)
    second.close()
    both.close()
    with pytest.raises(ScaleError, match=r"sensitivity of .* is -1.0"):
        load_calibration(tmp_path / "bad.safetensors")
