"""Sources of several formats: integers of 4 and of 8 bits beside FP8, told apart by groups, and what lies beside weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mfptq
from mfptq.errors import SourceError

from ..calibration.files import stored
from .checkpoints import FP8, Tensors, decoded, fp8_block, int4, opened, same, spread, weight, write

ROWS, COLUMNS = 64, 256
FP8_GROUP = {"format": "float-quantized", "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}


def integers(bits: int, group: int) -> dict[str, Any]:
    """Return a config group of packed integers."""
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group, "symmetric": True}
    return {"format": "pack-quantized", "weights": weights}


def config(*groups: dict[str, Any]) -> dict[str, Any]:
    named = {f"group_{number}": group for number, group in enumerate(groups)}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": named}}


def packed(name: str, group: int = 32) -> tuple[Tensors, torch.Tensor]:
    """Return a module in packed INT4, and its values."""
    made = int4(weight(ROWS, COLUMNS), group)
    tensors = {
        f"{name}.weight_packed": made["packed"],
        f"{name}.weight_scale": made["scale"],
        f"{name}.weight_shape": made["shape"],
    }
    scales = spread(made["scale"].float(), (1, group), (ROWS, COLUMNS))
    return tensors, (made["codes"].float() * scales).to(torch.bfloat16)


def packed_int8(name: str, group: int) -> tuple[Tensors, torch.Tensor]:
    """Return a module in packed INT8, four codes to a word, and its values."""
    codes = torch.randint(-128, 128, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    scales = torch.rand(ROWS, COLUMNS // group).to(torch.bfloat16)
    words = (codes + 128).to(torch.uint8).view(torch.int32)
    expected = (codes.float() * spread(scales.float(), (1, group), (ROWS, COLUMNS))).to(torch.bfloat16)
    shape = torch.tensor([ROWS, COLUMNS])
    return {f"{name}.weight_packed": words, f"{name}.weight_scale": scales, f"{name}.weight_shape": shape}, expected


def test_bits_of_floats_say_nothing_of_integers(tmp_path: Path) -> None:
    tensors, expected = packed("a")
    made = fp8_block(weight(ROWS, COLUMNS), (1, COLUMNS))
    tensors |= {"b.weight": made["weight"], "b.weight_scale": made["scale"]}
    write(tmp_path, tensors, config=config(integers(4, 32), FP8_GROUP))
    found = decoded(tmp_path)
    assert same(found["a.weight"], expected)
    assert found.keys() == {"a.weight", "b.weight"}


def test_integers_of_4_and_of_8_bits_are_told_apart_by_their_groups(tmp_path: Path) -> None:
    (four, values), (eight, others) = packed("a", 32), packed_int8("b", 128)
    write(tmp_path, four | eight, config=config(integers(4, 32), integers(8, 128)))
    found = decoded(tmp_path)
    assert same(found["a.weight"], values)
    assert same(found["b.weight"], others)


@pytest.mark.parametrize(
    "groups", [(integers(4, 64), integers(8, 128)), (integers(4, 64), integers(8, 32))], ids=["none", "two"]
)
def test_what_fits_no_bits_or_both_is_refused(groups: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    tensors, _ = packed("a", 32 if groups[1]["weights"]["group_size"] == 128 else 64)
    with pytest.raises(SourceError, match="declares num_bits 4 and 8 for integers"):
        opened(write(tmp_path, tensors, config=config(*groups)))


def test_a_bound_of_inputs_leaves_with_the_codes(tmp_path: Path) -> None:
    """fbgemm's `input_scale_ub`, which no module of the output has."""
    name = "model.layers.0.mlp.down_proj"
    codes = weight(ROWS, COLUMNS).to(FP8)
    tensors = {
        f"{name}.weight": codes,
        f"{name}.weight_scale": torch.rand(ROWS, 1),
        f"{name}.input_scale_ub": torch.tensor([1200.0]),
    }
    write(tmp_path / "source", tensors, config={"quantization_config": {"quant_method": "fbgemm_fp8"}})
    mfptq.convert(tmp_path / "source", tmp_path / "out")
    assert {each.rpartition(".")[2] for each in stored(tmp_path / "out")} == {
        "weight_packed", "weight_scale", "weight_global_scale",
    }  # fmt: skip
