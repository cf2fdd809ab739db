"""Sources that are NVFP4 already: what is there goes over, partners share their scales, and what is new has its own group."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mfptq
from mfptq.demo import DemoShape, write_demo
from mfptq.errors import NonFiniteWeightError, SourceError
from mfptq.nvfp4 import dequantize

from ..calibration.files import calibrate, stored
from ..conftest import command
from ..test_verification import change_stored, one_bit
from .checkpoints import DECODERS, Tensors, decoded, same, write

SHAPE = DemoShape(hidden=64, intermediate=96, layers=4, vocabulary=64)
PACKED = ".weight_packed"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bfloat16 checkpoint, and what it becomes where DeltaNet is left out, as a "standard" recipe does."""
    folder = tmp_path_factory.mktemp("made")
    write_demo(folder / "demo", SHAPE)
    calibration = calibrate(folder / "demo", folder / "calibration.safetensors")
    mfptq.convert(
        folder / "demo", folder / "nvfp4", calibration=calibration, method="search", ignore=["re:.*linear_attn.*"]
    )
    return folder


@pytest.fixture
def ours(made: Path, tmp_path: Path) -> Path:
    """A W4A4 checkpoint of which DeltaNet stays in bfloat16; its source is `demo` beside it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "nvfp4"


def rewritten(source: Path, folder: Path, change) -> Path:
    """Write a checkpoint again, shard by shard, with other tensors; without the report and the card."""
    shards = [change(load_file(file)) for file in sorted(source.glob("*.safetensors"))]
    return write(folder, *shards, config=json.loads((source / "config.json").read_text()))


def modelopt(tensors: Tensors) -> Tensors:
    """Return tensors as ModelOpt names and scales them."""
    names = {"weight_packed": "weight", "weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}
    found = {}
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        value = (1 / tensor[0]) if "global" in leaf else tensor
        found[f"{parent}.{names.get(leaf, leaf)}"] = value.clone()
    return found


def values(tensors: Tensors, module: str) -> np.ndarray:
    scales = tensors[f"{module}.weight_scale"].view(torch.uint8).numpy()
    return dequantize(tensors[module + PACKED].numpy(), scales, tensors[f"{module}.weight_global_scale"].item())


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)) for name in one
    )


def test_repair_of_a_sound_checkpoint_changes_no_tensor(ours: Path, tmp_path: Path) -> None:
    report = mfptq.convert(ours, tmp_path / "out", like=ours)
    assert equal(stored(ours), stored(tmp_path / "out"))
    assert report.warnings == ()
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (ours, tmp_path / "out"))
    assert one["quantization_config"]["config_groups"] == other["quantization_config"]["config_groups"]
    assert mfptq.verify(tmp_path / "out", ours).ok
    assert report.quantized == sum(name.endswith(PACKED) for name in stored(ours))


def test_modelopts_tensors_go_over_under_other_names(ours: Path, tmp_path: Path) -> None:
    theirs = rewritten(ours, tmp_path / "modelopt", modelopt)
    (theirs / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    mfptq.convert(theirs, tmp_path / "out", like=theirs)
    first, second = stored(ours), stored(tmp_path / "out")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if "input_global" in name:  # twice inverted
            assert torch.allclose(second[name], tensor, rtol=2e-7)
            assert second[name].shape == (1,)
        else:
            assert torch.equal(second[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert mfptq.verify(tmp_path / "out", theirs).ok
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_what_stayed_in_bf16_is_extended_in_a_group_without_activations(ours: Path, tmp_path: Path) -> None:
    report = mfptq.convert(ours, tmp_path / "out")
    before, after = stored(ours), stored(tmp_path / "out")
    assert report.scheme == "NVFP4"
    old = {name.removesuffix(PACKED) for name in before if name.endswith(PACKED)}
    new = {name.removesuffix(PACKED) for name in after if name.endswith(PACKED)} - old
    assert new
    assert all("linear_attn" in name for name in new)
    assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
               for name in before if name.rpartition(".")[0] in old)  # fmt: skip
    assert not any(f"{name}.input_global_scale" in after for name in new)
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear"]
    assert groups["group_0"]["input_activations"]["num_bits"] == 4
    assert groups["group_1"]["input_activations"] is None
    assert new <= set(groups["group_1"]["targets"])
    assert any(name.endswith("in_proj_qkvz") for name in groups["group_1"]["targets"])
    assert mfptq.verify(tmp_path / "out", ours).ok, mfptq.verify(tmp_path / "out", ours).faults
    alone = mfptq.convert(
        tmp_path / "demo", tmp_path / "alone", targets=["re:.*linear_attn.(in_proj_qkv|in_proj_z|out_proj)$"]
    )
    assert alone.scheme == "NVFP4A16"
    fresh = stored(tmp_path / "alone")
    assert all(np.array_equal(values(after, name), values(fresh, name)) for name in new)


def test_extended_with_input_scales_there_is_one_group(ours: Path, tmp_path: Path) -> None:
    known = calibrate(tmp_path / "demo", tmp_path / "again.safetensors")
    mfptq.convert(ours, tmp_path / "out", calibration=known, method="search")
    mfptq.convert(tmp_path / "demo", tmp_path / "whole", calibration=known, method="search")
    assert equal(stored(tmp_path / "out"), stored(tmp_path / "whole"))
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]) == 1


def test_weights_alone_drop_input_scales(ours: Path, tmp_path: Path) -> None:
    mfptq.convert(ours, tmp_path / "out", scheme="NVFP4A16", like=ours)
    before, after = stored(ours), stored(tmp_path / "out")
    assert equal(after, {name: value for name, value in before.items() if "input_global" not in name})


@pytest.mark.parametrize("ratio", [1.06, 1.37, 2.0])
def test_partners_with_unequal_scales_are_repaired(ours: Path, ratio: float, tmp_path: Path) -> None:
    """As llm-compressor leaves q, k and v of a layer: k's global scale is larger than the others'."""
    module = "model.language_model.layers.3.self_attn.k_proj"

    def change(tensors: Tensors) -> Tensors:
        for name in (f"{module}.weight_global_scale", f"{module}.input_global_scale"):
            if name in tensors:
                tensors[name] = tensors[name] * ratio
        return tensors

    broken = rewritten(ours, tmp_path / "broken", change)
    assert not mfptq.verify(broken).ok
    report = mfptq.convert(broken, tmp_path / "out", like=broken)
    assert len(report.warnings) == 1
    assert (
        f"unequal scales, by up to {ratio:.3g} times in '{module.removesuffix('k_proj')}qkv_proj'" in report.warnings[0]
    )
    assert mfptq.verify(tmp_path / "out", broken).ok
    before, after = stored(broken), stored(tmp_path / "out")
    assert torch.equal(before[module + PACKED], after[module + PACKED])
    one, other = values(before, module), values(after, module)
    error = np.linalg.norm(one - other) / np.linalg.norm(one)
    assert error == 0 if ratio == 2 else 0 < error < 1 / 16  # half a step of E4M3
    assert after[f"{module}.input_global_scale"] == after[f"{module.replace('k_proj', 'q_proj')}.input_global_scale"]


def test_the_command_repairs(ours: Path, tmp_path: Path) -> None:
    done = command("repair", ours, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert equal(stored(ours), stored(tmp_path / "out"))
    plain = command("repair", tmp_path / "demo", tmp_path / "other")
    assert plain.returncode == 4
    assert "has no layers in NVFP4 or FP8" in plain.stderr


def test_a_group_that_is_nvfp4_in_part_is_refused(ours: Path, tmp_path: Path) -> None:
    module = "model.language_model.layers.3.self_attn.k_proj"

    def change(tensors: Tensors) -> Tensors:
        found = {name: value for name, value in tensors.items() if not name.startswith(f"{module}.")}
        if module + PACKED in tensors:
            found[f"{module}.weight"] = torch.randn(16, 64, dtype=torch.bfloat16)
        return found

    with pytest.raises(SourceError, match=r"is NVFP4 in part: .* is, .*k_proj' is not"):
        mfptq.convert(rewritten(ours, tmp_path / "part", change), tmp_path / "out")


@pytest.mark.parametrize("value", [0.0, float("nan"), -1.0])
def test_global_scales_that_are_no_numbers_are_refused(ours: Path, value: float, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {
            name: torch.full_like(each, value) if name.endswith("weight_global_scale") else each
            for name, each in tensors.items()
        }

    with pytest.raises(SourceError, match="expected a positive number"):
        mfptq.plan(rewritten(ours, tmp_path / "bad", change))


@pytest.mark.parametrize(("code", "ratio"), [(0x7F, 1.0), (0xFF, 1.0), (0x7F, 1.37)])
def test_block_scales_that_are_nan_do_not_go_over(ours: Path, code: int, ratio: float, tmp_path: Path) -> None:
    """Neither as they are, nor where fused partners get one global scale."""
    module = "model.language_model.layers.1.mlp.up_proj"

    def change(tensors: Tensors) -> Tensors:
        if f"{module}.weight_scale" in tensors:
            scales = tensors[f"{module}.weight_scale"].view(torch.uint8)
            scales[3, 2] = code
            tensors[f"{module}.weight_global_scale"] *= ratio
        return tensors

    bad = rewritten(ours, tmp_path / "bad", change)
    place = 3 * SHAPE.hidden // 16 + 2
    with pytest.raises(NonFiniteWeightError, match=f"the scale of block {place} of '{module}' in .* is NaN"):
        mfptq.convert(bad, tmp_path / "out")


def test_ignored_modules_are_widened(ours: Path, tmp_path: Path) -> None:
    mfptq.convert(ours, tmp_path / "out", ignore=["re:.*mlp.down_proj$"])
    before, after = stored(ours), stored(tmp_path / "out")
    module = "model.language_model.layers.0.mlp.down_proj"
    expected = torch.from_numpy(values(before, module)).to(torch.bfloat16)
    assert same(after[f"{module}.weight"], expected)
    for decoder in DECODERS:
        assert same(decoded(ours, decoder)[f"{module}.weight"], expected)
    assert mfptq.verify(tmp_path / "out", ours).ok


def test_one_group_is_left_where_all_that_had_input_scales_is_ignored(ours: Path, tmp_path: Path) -> None:
    mfptq.convert(ours, tmp_path / "out", ignore=["re:.*(mlp|self_attn).*"])
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["input_activations"] for group in groups.values()] == [None]
    assert not any(name.endswith(".input_global_scale") for name in stored(tmp_path / "out"))
    assert mfptq.verify(tmp_path / "out", ours).ok


def test_a_scale_in_another_shard_goes_over_to_the_weights(ours: Path, tmp_path: Path) -> None:
    files = [load_file(file) for file in sorted(ours.glob("*.safetensors"))]
    moved = {name: value for shard in files for name, value in shard.items() if name.endswith(".weight_scale")}
    rest = [{name: value for name, value in shard.items() if name not in moved} for shard in files]
    apart = write(tmp_path / "apart", *rest, moved, config=json.loads((ours / "config.json").read_text()))
    mfptq.convert(apart, tmp_path / "out", like=apart)
    assert equal(stored(tmp_path / "out"), stored(ours))


@pytest.mark.parametrize("ending", [PACKED, ".weight_scale"])
def test_a_source_whose_codes_changed_is_found(ending: str, ours: Path, tmp_path: Path) -> None:
    mfptq.convert(ours, tmp_path / "out", like=ours)
    assert mfptq.verify(tmp_path / "out", ours).ok
    name = change_stored(ours, ending, one_bit)
    [fault] = [each for each in mfptq.verify(tmp_path / "out", ours).faults if each.tensor]
    assert fault.tensor == name
    assert fault.what == "differs from the source, which it should be equal to"


def test_a_mixture_stays_one(tmp_path: Path) -> None:
    """FP8 layers beside NVFP4 ones go over too, by default and by `repair`, in which nothing is quantized anew."""
    write_demo(tmp_path / "demo", DemoShape(hidden=128, intermediate=256, layers=4, vocabulary=64))
    mfptq.convert(
        tmp_path / "demo", tmp_path / "mixture", formats=["fp8-dynamic=re:.*self_attn.*", "fp8-block=re:.*down_proj$"]
    )
    before = stored(tmp_path / "mixture")
    mfptq.convert(tmp_path / "mixture", tmp_path / "again")
    assert equal(before, stored(tmp_path / "again"))
    done = command("repair", tmp_path / "mixture", tmp_path / "repaired")
    assert done.returncode == 0, done.stderr
    assert equal(before, stored(tmp_path / "repaired"))
    assert mfptq.verify(tmp_path / "repaired", tmp_path / "mixture").ok
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("mixture", "repaired"))
    assert one["quantization_config"]["config_groups"] == other["quantization_config"]["config_groups"]
    mfptq.convert(tmp_path / "mixture", tmp_path / "asked", targets=["re:.*self_attn.*"])
    assert "model.language_model.layers.3.self_attn.q_proj.weight_packed" in stored(tmp_path / "asked")
