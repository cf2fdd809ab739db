"""Weights that are kept, or asked for in FP8, and are FP8 in the source: their codes go over bit for bit, in a group of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mfptq
from mfptq.errors import NonFiniteWeightError
from mfptq.execution import memory_budget

from ..calibration.files import stored
from ..conftest import sampled
from ..encodings.checkpoints import E8M0, Tensors, fp8_block, weight, write

DRAFT = "mtp.layers.0.mlp"
MAIN = "model.layers.0.mlp"
LEAVES = ("gate_proj", "up_proj", "down_proj")
BLOCK = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
SIDE = 256


def source(folder: Path, block: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.float32) -> Path:
    """Write a decoder block and a drafter whose MLPs are FP8, each with a head and a norm."""
    tensors: Tensors = {"lm_head.weight": weight(64, SIDE), "mtp.fc.weight": weight(SIDE, 2 * SIDE)}
    size = (block[0] or SIDE, block[1] or SIDE)
    for number, name in enumerate([f"{parent}.{leaf}" for parent in (MAIN, DRAFT) for leaf in LEAVES]):
        made = fp8_block(weight(SIDE, SIDE, number), size, dtype)
        tensors |= {f"{name}.weight": made["weight"], f"{name}.weight_scale_inv": made["scale"]}
    return write(folder, tensors, config={"num_hidden_layers": 1, "hidden_size": SIDE, **BLOCK})


def formats(folder: Path, **decisions: object) -> dict[str, str]:
    with mfptq.plan(folder, **decisions) as plan:
        return {row.name.removesuffix(".weight"): row.format for row in plan.tensors}


def same_codes(one: Tensors, other: Tensors, name: str) -> bool:
    first, second = (tensors[f"{name}.weight"].view(torch.uint8) for tensors in (one, other))
    return torch.equal(first, second)


@pytest.mark.parametrize(("block", "dtype", "expected"), [
    ((128, 128), torch.float32, "fp8-block"), ((128, 128), torch.bfloat16, "fp8-block"), ((128, 128), E8M0, "fp8-block"),
    ((1, 0), torch.bfloat16, "fp8-dynamic"), ((0, 0), torch.float32, "fp8-dynamic"),
], ids=str)  # fmt: skip
def test_a_drafter_stays_fp8_bit_for_bit(
    block: tuple[int, int], dtype: torch.dtype, expected: str, tmp_path: Path
) -> None:
    folder = source(tmp_path / "source", block, dtype)
    report = mfptq.convert(folder, tmp_path / "out", method="minmax")
    before, after = stored(folder), stored(tmp_path / "out")
    for leaf in LEAVES:
        name = f"{DRAFT}.{leaf}"
        assert same_codes(before, after, name)
        scales = before[f"{name}.weight_scale_inv"].float()
        assert after[f"{name}.weight_scale"].dtype == torch.float32
        assert torch.equal(
            after[f"{name}.weight_scale"], scales.expand((SIDE, 1) if expected == "fp8-dynamic" else scales.shape)
        )
        assert f"{MAIN}.{leaf}.weight_packed" in after
    assert after["mtp.fc.weight"].dtype == torch.bfloat16
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert sorted(group["format"] for group in groups) == ["float-quantized", "nvfp4-pack-quantized"]
    found = mfptq.verify(tmp_path / "out", folder)
    assert found.ok, found.faults
    assert found.errors["mtp.layers.*.mlp.up_proj"] == 0
    assert [row.relative_error for row in report.patterns if row.format == expected] == [0, 0, 0]


def test_rules_take_codes_that_are_right_already(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    decisions = {"formats": ["fp8-block=re:model.*", "bf16=re:mtp.*"]}
    mfptq.convert(folder, tmp_path / "out", **decisions)
    before, after = stored(folder), stored(tmp_path / "out")
    assert all(same_codes(before, after, f"{MAIN}.{leaf}") for leaf in LEAVES)
    assert all(after[f"{DRAFT}.{leaf}.weight"].dtype == torch.bfloat16 for leaf in LEAVES)
    assert mfptq.verify(tmp_path / "out", folder).ok
    with mfptq.plan(folder, **decisions) as plan:
        assert set(plan._planned.methods) == {"cast"}
    with mfptq.plan(folder, formats=["fp8-dynamic=re:model.*"]) as plan:
        assert plan._planned.methods == {"search": 3, "cast": 3}


def test_what_is_ignored_stays_as_it_is_and_is_no_longer_in_the_ignore_list(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    mfptq.convert(folder, tmp_path / "out", ignore=["re:.*down_proj$"])
    assert same_codes(stored(folder), stored(tmp_path / "out"), f"{MAIN}.down_proj")
    assert mfptq.verify(tmp_path / "out", folder).ok
    with mfptq.plan(folder, ignore=["re:.*down_proj$"]) as plan:
        row = next(row for row in plan.tensors if row.name == f"{MAIN}.down_proj.weight")
        assert row.reason == "FP8 already, goes over as it is: ignored as asked"
        found = [each for each in plan.check(engines=("vllm", "sglang")) if each.severity == "error"]
    assert not found, found


def head(tensors: Tensors) -> Tensors:
    made = fp8_block(weight(64, SIDE), (1, SIDE))
    return tensors | {"lm_head.weight": made["weight"], "lm_head.weight_scale": made["scale"]}


def head_in_blocks(tensors: Tensors) -> Tensors:
    made = fp8_block(weight(64, SIDE))
    return tensors | {"lm_head.weight": made["weight"], "lm_head.weight_scale_inv": made["scale"]}


def half(tensors: Tensors) -> Tensors:
    name = f"{DRAFT}.up_proj"
    rest = {key: value for key, value in tensors.items() if not key.startswith(name)}
    return rest | {f"{name}.weight": weight(SIDE, SIDE)}


def router(tensors: Tensors) -> Tensors:
    made = fp8_block(weight(64, SIDE))
    return tensors | {f"{MAIN}.gate.weight": made["weight"], f"{MAIN}.gate.weight_scale_inv": made["scale"]}


@pytest.mark.parametrize(("change", "name", "expected"), [
    (head, "lm_head", "fp8-dynamic"), (head_in_blocks, "lm_head", ""), (half, f"{DRAFT}.gate_proj", ""),
    (half, f"{DRAFT}.down_proj", "fp8-block"), (router, f"{MAIN}.gate", ""),
])  # fmt: skip
def test_only_what_engines_load_stays_fp8(
    change: Callable[[Tensors], Tensors], name: str, expected: str, tmp_path: Path
) -> None:
    folder = source(tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    write(tmp_path / "changed", change(stored(folder)), config=config)
    assert formats(tmp_path / "changed")[name] == expected
    mfptq.convert(tmp_path / "changed", tmp_path / "out")
    assert mfptq.verify(tmp_path / "out", tmp_path / "changed").ok


@pytest.mark.parametrize("tile", sampled([512], [2**15]))
def test_bytes_do_not_depend_on_tiles(tile: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path / "source")
    mfptq.convert(folder, tmp_path / "expected")
    monkeypatch.setattr(memory_budget, "MIN_TILE", 256)
    monkeypatch.setattr("mfptq.kernels.cpu.CpuKernel.tile_bytes", tile)
    mfptq.convert(folder, tmp_path / "out")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("expected", "out"))
    assert one == other


@pytest.mark.parametrize("poison", ["code", "scale"])
def test_what_is_no_number_is_refused_with_its_place(poison: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    tensors, config = stored(folder), json.loads((folder / "config.json").read_text())
    name = f"{DRAFT}.up_proj.weight"
    if poison == "code":
        tensors[name].view(torch.uint8)[3, 5] = 0xFF
    else:
        tensors[f"{name}_scale_inv"][1, 0] = torch.nan
    write(tmp_path / "bad", tensors, config=config)
    place = 3 * SIDE + 5 if poison == "code" else 128 * SIDE
    with pytest.raises(NonFiniteWeightError, match=rf"'{DRAFT}\.up_proj' .* no number at flat index {place}"):
        mfptq.convert(tmp_path / "bad", tmp_path / "out")


@pytest.mark.parametrize("ending", [".weight", ".weight_scale_inv"])
def test_a_source_that_changed_is_found(ending: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    mfptq.convert(folder, tmp_path / "out")
    tensors, config = stored(folder), json.loads((folder / "config.json").read_text())
    tensors[f"{DRAFT}.up_proj{ending}"].view(torch.uint8)[0, 0] ^= 1
    write(folder, tensors, config=config)
    faults = mfptq.verify(tmp_path / "out", folder).faults
    assert any(each.tensor == f"{DRAFT}.up_proj" and "other codes or scales" in each.what for each in faults)


@pytest.mark.parametrize(
    ("draft", "expected"),
    [
        ("mtp.layers.0.mlp", "fp8-block"),
        ("model.mtp.layers.0.mlp", "fp8-block"),
        ("mtp.0.mlp", ""),
        ("model.mtp_layers.0.mlp", ""),
    ],
)
def test_a_drafter_that_engines_name_otherwise_is_widened(draft: str, expected: str, tmp_path: Path) -> None:
    """DeepSeek-V4's `mtp.0` is `layers.N` in engines: patterns over names of tensors would not find it."""
    folder = source(tmp_path / "source")
    tensors = {name.replace(DRAFT, draft): values for name, values in stored(folder).items()}
    write(folder, tensors, config=json.loads((folder / "config.json").read_text()))
    assert {formats(folder)[f"{draft}.{leaf}"] for leaf in LEAVES} == {expected}
