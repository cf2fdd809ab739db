"""MXFP4 to NVFP4: codes go over as they are, and values are the source's, as far as E4M3 holds the exponents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mfptq
from mfptq.errors import NonFiniteWeightError
from mfptq.execution import memory_budget
from mfptq.nvfp4 import dequantize

from ..conftest import sampled
from .checkpoints import Tensors, mxfp4_values, write

GATE, UP, DOWN = (f"model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))


def coded(name: str, low: int, high: int, *, shape: tuple[int, int] = (64, 128)) -> Tensors:
    """Return a weight of random codes whose exponents lie between two bytes, both of which occur."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(low + high)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scale = torch.randint(low, high + 1, (rows, columns // 32), dtype=torch.uint8, generator=generator)
    scale[0, 0], scale[0, 1] = low, high
    return {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale}


def values(tensors: Tensors, name: str) -> np.ndarray:
    """Return what a weight of the source means."""
    return mxfp4_values(tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]).float().numpy()


def made(folder: Path) -> Tensors:
    """Return the tensors of an output."""
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def meaning(tensors: Tensors, name: str) -> np.ndarray:
    """Return what a weight of an output means."""
    packed, scale, divisor = (tensors[f"{name}.weight_{part}"] for part in ("packed", "scale", "global_scale"))
    return dequantize(packed.numpy(), scale.view(torch.uint8).numpy(), divisor.item())


@pytest.mark.parametrize("span", sampled([0, 15, 17], [8, 14, 16]))
def test_nothing_is_lost_with_unequal_partners(span: int, tmp_path: Path) -> None:
    tensors = coded(GATE, 120, 120) | coded(UP, 120 - span, 120) | coded(DOWN, 100, 103)
    source = write(tmp_path / "source", tensors)
    mfptq.convert(source, tmp_path / "out")
    found = made(tmp_path / "out")
    for name in (GATE, UP, DOWN):
        assert torch.equal(found[f"{name}.weight_packed"], tensors[f"{name}.weight_packed"])
        assert np.array_equal(meaning(found, name), values(tensors, name))
    assert found[f"{GATE}.weight_global_scale"].item() == found[f"{UP}.weight_global_scale"].item() == 2.0 ** (8 + 7)
    assert found[f"{DOWN}.weight_global_scale"].item() == 2.0 ** (8 - 103 + 127)
    assert mfptq.verify(tmp_path / "out", source).ok


def test_partners_in_other_files_count_too(tmp_path: Path) -> None:
    tensors = [coded(GATE, 104, 110), coded(UP, 110, 121)]
    source = write(tmp_path / "source", *tensors)
    mfptq.convert(source, tmp_path / "out")
    found = made(tmp_path / "out")
    assert found[f"{GATE}.weight_global_scale"].item() == 2.0 ** (8 - 121 + 127)
    assert np.array_equal(meaning(found, GATE), values(tensors[0], GATE))


def test_blocks_further_below_are_rounded_and_nothing_else_is(tmp_path: Path) -> None:
    tensors = coded(GATE, 118, 120) | coded(UP, 120 - 17, 120)
    low = tensors[f"{UP}.weight_scale"]
    low[1, 0], low[2, 3] = 120 - 18, 120 - 40
    report = mfptq.convert(write(tmp_path / "source", tensors), tmp_path / "out")
    found, expected = meaning(made(tmp_path / "out"), UP), values(tensors, UP)
    error = np.abs(found - expected).reshape(64, 4, 32).max(axis=2)
    assert {(int(row), int(column)) for row, column in np.argwhere(error)} == {(1, 0), (2, 3)}
    step = 2.0 ** (120 - 127 - 17)  # the smallest scale: half of it, a code, is the least value
    assert error.max() <= step / 4
    assert 0 < report.relative_error < 1e-4


def test_zero_blocks_do_not_count(tmp_path: Path) -> None:
    tensors = coded(GATE, 60, 66)
    tensors[f"{GATE}.weight_scale"][5] = 0
    tensors[f"{GATE}.weight_packed"][5] = 0
    mfptq.convert(write(tmp_path / "source", tensors), tmp_path / "out")
    assert np.array_equal(meaning(made(tmp_path / "out"), GATE), values(tensors, GATE))
    empty = {
        f"{GATE}.weight_packed": torch.zeros(64, 64, dtype=torch.uint8),
        f"{GATE}.weight_scale": torch.zeros(64, 4, dtype=torch.uint8),
    }
    mfptq.convert(write(tmp_path / "empty", empty), tmp_path / "none")
    found = made(tmp_path / "none")
    assert not meaning(found, GATE).any()
    assert found[f"{GATE}.weight_global_scale"].item() == 2.0**8


@pytest.mark.parametrize("tile", sampled([96, 2048], [64, 256]))
def test_tiles_change_nothing(tile: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = coded(GATE, 100, 119, shape=(48, 320)) | coded(UP, 110, 122, shape=(48, 320))
    source = write(tmp_path / "source", tensors)
    mfptq.convert(source, tmp_path / "expected")
    monkeypatch.setattr(memory_budget, "MIN_TILE", tile)
    monkeypatch.setattr("mfptq.kernels.cpu.CpuKernel.tile_bytes", tile)
    mfptq.convert(source, tmp_path / "out", max_workers=2)
    one, other = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "expected"))
    assert one == other


def test_nan_is_refused_with_its_place(tmp_path: Path) -> None:
    tensors = coded(GATE, 100, 110)
    tensors[f"{GATE}.weight_scale"][7, 2] = 255
    with pytest.raises(NonFiniteWeightError, match=f"holds nan at flat index {7 * 128 + 64}:"):
        mfptq.convert(write(tmp_path / "source", tensors), tmp_path / "out")


def test_a_method_that_is_asked_for_holds_for_every_weight(tmp_path: Path) -> None:
    tensors = coded(GATE, 100, 119)
    source = write(tmp_path / "source", tensors)
    with mfptq.plan(source) as plan, mfptq.plan(source, method="search") as searched:
        assert (dict(plan.methods), dict(searched.methods)) == ({"cast": 1}, {"search": 1})
    mfptq.convert(source, tmp_path / "search", method="search")
    plain = {f"{GATE}.weight": torch.from_numpy(values(tensors, GATE)).to(torch.bfloat16)}
    mfptq.convert(write(tmp_path / "plain", plain), tmp_path / "other", method="search")
    one, other = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("search", "other"))
    assert one == other


def test_a_group_of_which_only_a_part_is_mxfp4_is_quantized(tmp_path: Path) -> None:
    mixed = coded(GATE, 100, 110) | {f"{UP}.weight": torch.randn(64, 128).to(torch.bfloat16)}
    with mfptq.plan(write(tmp_path / "source", mixed)) as plan:
        assert dict(plan.methods) == {"search": 2}
