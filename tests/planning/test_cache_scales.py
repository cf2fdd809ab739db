"""Scales of an FP8 cache of keys and values: from a calibration pass, from the source, or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mfptq
from mfptq.calibration.file import CalibrationContents, write_calibration
from mfptq.calibration.reading import load_calibration
from mfptq.errors import ScaleError, SourceError
from mfptq.names.attention import attention_of
from tests.calibration.files import calibrate, stored
from tests.conftest import command

LAYER = "model.language_model.layers.3.self_attn"


def with_ranges(source: Path, path: Path, ranges: dict[str, tuple[float, float]]) -> Path:
    """Write a calibration file that also has ranges of keys and values."""
    with_inputs = load_calibration(calibrate(source, path.with_name("inputs.safetensors")))
    about, infos = with_inputs.description, tuple(with_inputs.inputs.values())
    write_calibration(path, CalibrationContents(about, infos, with_inputs.read, {}, key_values=ranges))
    with_inputs.close()
    return path


def cache_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in stored(folder).items() if name.endswith(("k_scale", "v_scale"))}


@pytest.mark.parametrize("formats", [[], ["fp8-dynamic=re:.*self_attn.*"], ["bf16=re:.*self_attn.*"]])
def test_ranges_of_a_calibration_file_become_scales(source: Path, tmp_path: Path, formats: list[str]) -> None:
    file = with_ranges(source, tmp_path / "c.safetensors", {f"{LAYER}.k_proj": (89.6, 0.0)})
    mfptq.convert(source, tmp_path / "out", calibration=file, kv_cache="fp8", formats=formats)
    found = cache_tensors(tmp_path / "out")
    assert {name: (value.dtype, value.tolist()) for name, value in found.items()} == {
        f"{LAYER}.k_scale": (torch.float32, [pytest.approx(0.2)]),
        f"{LAYER}.v_scale": (torch.float32, [1.0]),
    }
    assert mfptq.verify(tmp_path / "out", source).ok
    assert mfptq.check(tmp_path / "out").ok
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index[f"{LAYER}.k_scale"] == index[next(name for name in index if name.startswith(f"{LAYER}.k_proj."))]


def test_without_an_fp8_cache_nothing_is_written(source: Path, tmp_path: Path) -> None:
    file = with_ranges(source, tmp_path / "c.safetensors", {f"{LAYER}.k_proj": (1.0, 1.0)})
    mfptq.convert(source, tmp_path / "out", calibration=file)
    assert not cache_tensors(tmp_path / "out")


def test_names_of_another_prefix_are_matched_and_others_refused(source: Path, tmp_path: Path) -> None:
    file = with_ranges(
        source, tmp_path / "c.safetensors", {f"model.{LAYER.partition('language_model.')[2]}.k_proj": (448.0, 44.8)}
    )
    with mfptq.plan(source, calibration=file, kv_cache="fp8") as plan:
        assert plan._planned.cache_scales.layers == 1
    file = with_ranges(source, tmp_path / "d.safetensors", {"model.layers.77.self_attn.k_proj": (1.0, 1.0)})
    with pytest.raises(ScaleError, match="belongs to no module"), mfptq.plan(source, calibration=file, kv_cache="fp8"):
        pass


def fp8_source(folder: Path, scales: dict[str, torch.Tensor]) -> Path:
    """Write a checkpoint whose weights are FP8, one scale each, with scales of its cache."""
    generator = torch.Generator().manual_seed(0)
    tensors = dict(scales)
    for leaf in ("q", "k", "v", "o"):
        name = f"model.layers.0.self_attn.{leaf}_proj"
        tensors[f"{name}.weight"] = torch.randn((64, 64), generator=generator).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = torch.tensor([0.02])
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    return folder


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ("self_attn.k_scale", "self_attn.v_scale"),
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
        ("self_attn.attn.k_scale", "self_attn.attn.v_scale"),
    ],
)
def test_the_scales_of_a_source_are_carried_over(tmp_path: Path, keys: str, values: str) -> None:
    scales = {
        f"model.layers.0.{keys}": torch.tensor(0.25),
        f"model.layers.0.{values}": torch.tensor(0.5, dtype=torch.bfloat16),
    }
    source = fp8_source(tmp_path / "source", scales)
    with mfptq.plan(source) as plan:
        assert any("2 scales of the key-value cache go over if" in note for note in plan._planned.contents.notes)
    mfptq.convert(source, tmp_path / "out", kv_cache="fp8")
    found = {name: value.tolist() for name, value in cache_tensors(tmp_path / "out").items()}
    assert found == {"model.layers.0.self_attn.k_scale": [0.25], "model.layers.0.self_attn.v_scale": [0.5]}
    assert mfptq.verify(tmp_path / "out", source).ok
    mfptq.convert(source, tmp_path / "plain")
    assert not cache_tensors(tmp_path / "plain")


def test_one_scale_for_both_counts_twice_and_scales_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source = fp8_source(tmp_path / "source", {"model.layers.0.self_attn.kv_scale": torch.tensor([0.125])})
    mfptq.convert(source, tmp_path / "out", kv_cache="fp8")
    assert {value.item() for value in cache_tensors(tmp_path / "out").values()} == {0.125}
    source = fp8_source(tmp_path / "bad", {"model.layers.0.self_attn.k_scale": torch.tensor([-1.0])})
    with pytest.raises(SourceError, match=r"is -1\.0, expected a positive number"), mfptq.plan(source, kv_cache="fp8"):
        pass


def test_verify_looks_at_the_scales(source: Path, tmp_path: Path) -> None:
    file = with_ranges(source, tmp_path / "c.safetensors", {f"{LAYER}.k_proj": (1.0, 1.0)})
    mfptq.convert(source, tmp_path / "out", calibration=file, kv_cache="fp8")
    for shard in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(shard)
        if f"{LAYER}.k_scale" in tensors:
            save_file(tensors | {f"{LAYER}.k_scale": torch.tensor([float("nan")])}, shard, {"format": "pt"})
    faults = [str(fault) for fault in mfptq.verify(tmp_path / "out").faults]
    assert any("k_scale" in fault and "expected a positive number" in fault for fault in faults)


def test_the_plan_says_what_is_written(source: Path, tmp_path: Path) -> None:
    file = with_ranges(source, tmp_path / "c.safetensors", {f"{LAYER}.k_proj": (1.0, 1.0)})
    shown = command("plan", source, "--no-estimate", "--kv-cache", "fp8", "--calibration", file).stdout
    assert "keys and values in FP8, with scales of 1 layer from the calibration file" in shown.replace("\n ", "")
    assert "without scales: engines take 1.0" in command("plan", source, "--no-estimate", "--kv-cache", "fp8").stdout


@pytest.mark.parametrize("leaf", ["k_scale", "k_proj.k_scale", "v_proj.v_scale", "attn.kv_scale", "k_proj", "qkv_proj"])
def test_the_layer_of_a_name(leaf: str) -> None:
    assert attention_of(f"model.layers.0.self_attn.{leaf}") == "model.layers.0.self_attn"
