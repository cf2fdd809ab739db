"""The commands for calibration files, and taking scales and layers from checkpoints that other tools made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mfptq
from mfptq.calibration.extract import extract_scales
from mfptq.calibration.reading import load_calibration
from mfptq.errors import RuleError, ScaleError
from mfptq.scales.sibling import read_sibling

from ..calibration.files import (
    InputInfo,
    calibrate,
    described,
    layers_of,
    random_inputs,
    statistics_of,
    stored,
    write_file,
)
from ..conftest import command

Q, K, V = (f"model.language_model.layers.3.self_attn.{leaf}_proj" for leaf in "qkv")
GATE = "model.language_model.layers.0.mlp.gate_proj"
MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}


@pytest.fixture
def path(source: Path, tmp_path: Path) -> Path:
    return calibrate(source, tmp_path / "demo.calibration.safetensors")


def quantized(folder: Path) -> set[str]:
    return {name.removesuffix(".weight_packed") for name in stored(folder) if name.endswith(".weight_packed")}


def checkpoint(folder: Path, tensors, config=None) -> Path:
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def as_modelopt(tensors):
    """Return an NVFP4 checkpoint's tensors as ModelOpt names and scales them."""
    result = {}
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            result[f"{module}.weight"] = value
        elif kind == "input_global_scale":
            result[f"{module}.input_scale"] = 1 / value[0]
        elif kind == "weight_global_scale":
            result[f"{module}.weight_scale_2"] = 1 / value[0]
        else:
            result[name] = value
    return result


# merge and show


def test_merge_and_show(source, tmp_path):
    one = calibrate(source, tmp_path / "1.safetensors", described(dataset="1"))
    two = calibrate(source, tmp_path / "2.safetensors", described(dataset="2"))
    both = tmp_path / "both.calibration.safetensors"
    assert command("calibration", "merge", one, two, "--output", both).returncode == 0
    again = command("calibration", "merge", one, two, "--output", both)
    assert again.returncode == 2
    assert "exists: choose another name, or overwrite it" in again.stderr
    shown = command("calibration", "show", both).stdout
    assert "statistics hessian of 16 inputs, 25 modules" in shown
    assert "4 of 4 samples of up to 64 tokens; tokens of each input: 600 to 600" in shown
    found = json.loads(command("calibration", "show", both, "--json").stdout)
    assert found["description"]["dataset"] == "1+2"
    assert len(found["inputs"]) == 16
    assert mfptq.plan(source, calibration=both).methods.keys() == {"hessian+"}


def test_show_puts_outliers_and_experts_with_little_text_first(tmp_path):
    calm, wild = random_inputs(32), random_inputs(32, seed=1)
    wild[5, 7] = 5000.0
    inputs = {InputInfo(name, 32, (name,)): statistics_of(x) for name, x in (("calm", calm), ("wild", wild))}
    counts = {"a.experts": np.array([500, 0, 20, 300]), "b.experts": np.array([500, 400, 300, 200])}
    path = write_file(tmp_path / "a.safetensors", inputs, routed=counts)
    found = json.loads(command("calibration", "show", path, "--json").stdout)
    assert [each["name"] for each in found["inputs"]] == ["wild", "calm"]
    assert found["inputs"][0]["ratio"] == pytest.approx(5000 / np.sqrt((wild**2).mean()), rel=1e-5)
    assert found["experts"][0] == {"name": "a.experts", "experts": 4, "without": 1, "few": 2, "least": 0, "most": 500}
    text = command("calibration", "show", path).stdout
    assert "8 routed experts: 1 was given no token, 2 fewer than 100" in text
    assert "'b.experts'" not in text


def test_show_refuses_what_is_no_calibration_file(source):
    done = command("calibration", "show", source / "model-00001-of-00003.safetensors")
    assert done.returncode == 4
    assert "no calibration file" in done.stderr


# extract


def test_what_was_extracted_gives_the_same_scales(source, path, tmp_path):
    mfptq.convert(source, tmp_path / "first", calibration=path, smooth=False)
    output = tmp_path / "taken.calibration.safetensors"
    assert command("calibration", "extract", tmp_path / "first", "--output", output).returncode == 0
    report = mfptq.convert(source, tmp_path / "second", calibration=output)
    assert (report.scheme, report.method) == ("NVFP4", "search")
    one, two = stored(tmp_path / "first"), stored(tmp_path / "second")
    names = [name for name in one if name.endswith("input_global_scale")]
    assert len(names) == 25
    for name in names:
        assert two[name].item() == pytest.approx(one[name].item(), rel=2e-7)


def test_modelopt_scales_are_extracted_by_their_kind(source, path, tmp_path):
    mfptq.convert(source, tmp_path / "first", calibration=path, input_margin=1, smooth=False)
    theirs = checkpoint(tmp_path / "modelopt", as_modelopt(stored(tmp_path / "first")), MODELOPT)
    extract_scales(theirs, tmp_path / "taken.safetensors")
    taken, original = load_calibration(tmp_path / "taken.safetensors"), load_calibration(path)
    amax = {module: original.read(info).amax for info in original.inputs.values() for module in info.modules}
    assert {info.modules[0]: info.columns for info in taken.inputs.values()} == {
        module: columns for columns, members in layers_of(source).values() for module in members
    }
    for info in taken.inputs.values():
        assert taken.read(info).amax == pytest.approx(amax[info.name], rel=3e-7)
        assert taken.read(info).tokens is None
    taken.close()
    original.close()


def test_scales_that_mark_no_calibration_are_left_out(tmp_path):
    layer = {
        "weight_packed": torch.zeros(16, 16, dtype=torch.uint8),
        "weight_scale": torch.zeros(16, 2).to(torch.float8_e4m3fn),
    }
    tensors = {f"experts.{e}.up_proj.{name}": value.clone() for e in range(3) for name, value in layer.items()}
    scales = {0: 800.0, 1: 0.0, 2: float("inf")}
    tensors |= {f"experts.{e}.up_proj.input_global_scale": torch.tensor([scales[e]]) for e in range(3)}
    extract_scales(checkpoint(tmp_path / "c", tensors), tmp_path / "taken.safetensors")
    taken = load_calibration(tmp_path / "taken.safetensors")
    assert list(taken.inputs) == ["experts.0.up_proj"]
    taken.close()


def test_a_checkpoint_without_scales_has_nothing_to_extract(source, tmp_path):
    mfptq.convert(source, tmp_path / "weights")
    for folder, problem in ((tmp_path / "weights", "it is weight-only"), (source, "has no layers in NVFP4 or FP8")):
        done = command("calibration", "extract", folder, "--output", tmp_path / "taken.safetensors")
        assert done.returncode == 4
        assert problem in done.stderr
        assert not (tmp_path / "taken.safetensors").exists()


# --like


def test_like_takes_the_choice_of_layers_and_the_scales(source, path, tmp_path):
    mfptq.convert(source, tmp_path / "first", calibration=path, method="search", ignore=[r"re:.*mlp.*"])
    first = quantized(tmp_path / "first")
    report = mfptq.convert(source, tmp_path / "second", like=tmp_path / "first")
    assert report.scheme == "NVFP4"
    assert quantized(tmp_path / "second") == first
    assert not any("mlp" in name for name in first)
    one, two = stored(tmp_path / "first"), stored(tmp_path / "second")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8)) for name in one)
    assert mfptq.verify(tmp_path / "second", source).ok


def test_like_overrules_the_defaults(source, tmp_path):
    mfptq.convert(source, tmp_path / "first", targets=["lm_head"])
    assert "lm_head" in quantized(tmp_path / "first")
    report = mfptq.convert(source, tmp_path / "second", like=tmp_path / "first")
    assert report.scheme == "NVFP4A16"  # it has no input scales
    assert quantized(tmp_path / "second") == quantized(tmp_path / "first")
    mfptq.convert(source, tmp_path / "third", like=tmp_path / "first", ignore=["lm_head"])
    assert quantized(tmp_path / "third") == quantized(tmp_path / "first") - {"lm_head"}


def test_like_reads_modelopt_and_experts_by_name(moe_source, tmp_path):
    path = calibrate(moe_source, tmp_path / "moe.safetensors")
    mfptq.convert(moe_source, tmp_path / "first", calibration=path, ignore=[r"re:.*shared_expert.*"])
    theirs = checkpoint(tmp_path / "modelopt", as_modelopt(stored(tmp_path / "first")), MODELOPT)
    mfptq.convert(moe_source, tmp_path / "second", like=theirs)
    assert quantized(tmp_path / "second") == quantized(tmp_path / "first")
    one, two = stored(tmp_path / "first"), stored(tmp_path / "second")
    for name in one:
        if name.endswith("input_global_scale"):
            assert two[name].item() == pytest.approx(one[name].item(), rel=3e-7)


def test_like_reads_modelopt_stacks(moe_source, tmp_path):
    stack = "model.language_model.layers.0.mlp.experts."
    tensors = {}
    for leaf, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        tensors[stack + leaf] = torch.zeros(4, rows, columns // 2, dtype=torch.uint8)
        tensors[f"{stack}{leaf}_weight_scale"] = torch.zeros(4, rows, columns // 16).to(torch.float8_e4m3fn)
        tensors[f"{stack}{leaf}_input_scale"] = torch.tensor(0.01)
    theirs = checkpoint(tmp_path / "modelopt", tensors, MODELOPT)
    like = read_sibling(theirs)
    assert like.layers == {f"{stack}gate_up_proj": 64, f"{stack}down_proj": 32}
    mfptq.convert(moe_source, tmp_path / "out", like=theirs)
    leaves = ("gate_proj", "up_proj", "down_proj")
    assert quantized(tmp_path / "out") == {f"{stack}{e}.{leaf}" for e in range(4) for leaf in leaves}


def test_like_of_another_model_or_of_half_a_group_is_refused(source, path, tmp_path):
    mfptq.convert(source, tmp_path / "first", calibration=path)
    tensors = stored(tmp_path / "first")
    foreign = checkpoint(tmp_path / "foreign", {name.replace("layers.0", "layers.7"): t for name, t in tensors.items()})
    with pytest.raises(ScaleError, match=r"belong to no module of the source.*is it of another model\?"):
        mfptq.convert(source, tmp_path / "out", like=foreign)
    half = checkpoint(tmp_path / "half", {name: value for name, value in tensors.items() if not name.startswith(K)})
    with pytest.raises(RuleError, match="splits fused group"):
        mfptq.convert(source, tmp_path / "out", like=half)
    with pytest.raises(ScaleError, match="has no layers in NVFP4 or FP8"):
        mfptq.convert(source, tmp_path / "out", like=source)
    with pytest.raises(ScaleError, match="checkpoint "):
        mfptq.convert(source, tmp_path / "out", like=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_the_library_has_the_functions_behind_the_commands():
    assert mfptq.extract_scales is extract_scales
    assert mfptq.load_calibration is load_calibration
    assert {"extract_scales", "load_calibration", "merge_calibrations"} <= set(mfptq.__all__)


def test_help_names_the_commands():
    for name in ("merge", "show", "extract"):
        done = command("calibration", name, "--help")
        assert done.returncode == 0
        assert "Example: mfptq calibration" in done.stdout


def test_like_of_an_fp8_checkpoint_takes_its_layers_but_none_that_no_engine_has_in_fp4(source, tmp_path):
    tensors = stored(source)
    fp8 = {name: value for name, value in tensors.items() if not name.startswith(Q)}
    for module in (Q, K, V):
        fp8[f"{module}.weight"] = torch.zeros_like(tensors[f"{module}.weight"]).to(torch.float8_e4m3fn)
        fp8[f"{module}.weight_scale"] = torch.ones(1)
    theirs = checkpoint(tmp_path / "fp8", fp8)
    mfptq.convert(source, tmp_path / "out", like=theirs)
    assert quantized(tmp_path / "out") == {Q, K, V}
