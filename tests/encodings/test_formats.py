"""Several formats for sources that are quantized: what is decoded may become FP8, what is NVFP4 goes over as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mfptq
from mfptq.demo import DemoShape, write_demo
from mfptq.errors import RuleError, UsageError

from ..calibration.files import calibrate, stored
from ..conftest import sampled
from .test_convert import SMALL, twins

SHAPE = DemoShape(hidden=64, intermediate=96, layers=4, vocabulary=64)


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A W4A4 checkpoint of which DeltaNet stays in bfloat16; tests only read it."""
    folder = tmp_path_factory.mktemp("partly")
    write_demo(folder / "demo", SHAPE)
    calibration = calibrate(folder / "demo", folder / "calibration.safetensors")
    mfptq.convert(folder / "demo", folder / "nvfp4", calibration=calibration, ignore=["re:.*linear_attn.*"])
    return folder / "nvfp4"


@pytest.fixture(scope="module")
def release_and_cast(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return twins(tmp_path_factory.mktemp("twins"), SMALL, "MXFP4")


def groups(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]


@pytest.mark.parametrize(
    ("target", "method"),
    sampled([("fp8-dynamic", "minmax"), ("fp8-block", "search")], [("fp8-dynamic", "search"), ("fp8-block", "minmax")]),
)
def test_decoded_weights_become_fp8_as_their_cast_does(
    release_and_cast: tuple[Path, Path], tmp_path: Path, target: str, method: str
) -> None:
    release, cast = release_and_cast
    for source in (release, cast):
        mfptq.convert(source, tmp_path / f"of-{source.name}", method=method, formats=[f"{target}=re:.*down_proj$"])
    one, other = stored(tmp_path / f"of-{release.name}"), stored(tmp_path / f"of-{cast.name}")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)
    assert any(tensor.dtype == torch.float8_e4m3fn and name.endswith("proj.weight") for name, tensor in one.items())
    assert mfptq.verify(tmp_path / f"of-{release.name}", release).ok


def test_what_is_new_becomes_fp8_beside_what_is_nvfp4_already(partly: Path, tmp_path: Path) -> None:
    report = mfptq.convert(partly, tmp_path / "out", formats=["fp8-dynamic=re:.*linear_attn.*"])
    before, after = stored(partly), stored(tmp_path / "out")
    assert set(report.formats) == {"nvfp4", "fp8-dynamic"}
    carried = [name for name in before if name.endswith(("weight_packed", "global_scale"))]
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in carried)
    assert len(groups(tmp_path / "out")) == 2
    found = mfptq.verify(tmp_path / "out", partly)
    assert found.ok, found.faults


def test_what_is_nvfp4_already_can_lose_its_input_scales_and_become_nothing_else(partly: Path, tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="cannot be fp8-dynamic: it is NVFP4 in the source"):
        mfptq.plan(partly, formats=["fp8-dynamic=re:.*down_proj$"])
    ignore = ["re:.*linear_attn.*"]
    report = mfptq.convert(partly, tmp_path / "out", formats=["nvfp4a16=re:.*mlp.*"], ignore=ignore)
    assert set(report.formats) == {"nvfp4", "nvfp4a16"}
    names = [name for name in stored(tmp_path / "out") if name.endswith("input_global_scale")]
    assert names
    assert not any(".mlp." in name for name in names)
    found = mfptq.verify(tmp_path / "out", partly)
    assert found.ok, found.faults


def test_inputs_that_were_asked_for_need_scales(partly: Path) -> None:
    with pytest.raises(UsageError, match="needs input scales"):
        mfptq.plan(partly, formats=["nvfp4=re:.*linear_attn.*"])
