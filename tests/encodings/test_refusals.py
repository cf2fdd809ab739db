"""What is not read is refused by name, from headers and configs, before the destination exists; the message says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mfptq
from mfptq.errors import SourceError

from ..conftest import command
from .checkpoints import Tensors, weight, write

PLAIN: Tensors = {"model.layers.0.self_attn.q_proj.weight": weight(16, 32)}
U8 = torch.zeros(16, 16, dtype=torch.uint8)
I8 = torch.zeros(16, 16, dtype=torch.int8)
M = "model.layers.0.mlp.up_proj"


def said(method: str) -> dict:
    return {"quantization_config": {"quant_method": method}}


REFUSED: dict[str, tuple[Tensors, dict, str]] = {
    "bitsandbytes 4": ({f"{M}.weight": U8[:, :1].contiguous(), f"{M}.weight.absmax": torch.ones(4)}, {}, "bitsandbytes 4-bit"),
    "bitsandbytes 8": ({f"{M}.weight": I8, f"{M}.SCB": torch.ones(16)}, {}, "bitsandbytes 8-bit"),
    "bitsandbytes named": ({f"{M}.weight": I8}, said("bitsandbytes"), r"'bitsandbytes' \(config.json: quantization_config\)"),
    "torchao": ({f"{M}.weight_qdata": I8}, said("torchao"), "for running a model, not for publishing"),
    "quark": ({f"{M}.weight": U8, f"{M}.weight_scale": U8.clone()}, said("quark"), "compressed-tensors release"),
    "quark, unnamed": ({f"{M}.weight": U8, f"{M}.weight_scale": U8.clone()}, {}, "without the scales"),
    "torchao, unnamed": ({f"{M}.weight:_weight_qdata": I8}, {}, "torchao"),
    "hqq, unnamed": ({f"{M}.W_q": U8}, {}, "HQQ"),
    "aqlm, unnamed": ({f"{M}.codebooks": weight(16, 16), f"{M}.codes": I8}, {}, "AQLM"),
    "vptq, unnamed": ({f"{M}.centroids.weight": weight(16, 16), f"{M}.indices": I8}, {}, "VPTQ"),
    "quanto, unnamed": ({f"{M}.weight._data": I8}, {}, "Quanto"),
    "FP8 under another name": ({"connector.proj": torch.zeros(16, 16, dtype=torch.float8_e4m3fn)}, {}, "without the scales"),
    "FP8 norm": ({"model.norm.weight": torch.zeros(16, dtype=torch.float8_e4m3fn)}, {}, "without the scales"),
    "hqq": ({f"{M}.W_q": U8}, said("hqq"), "'hqq'"),
    "auto-round": ({f"{M}.qweight": U8}, {"llm_config": said("auto-round")}, "'auto-round' .*llm_config: quantization_config"),
    "pre_quant_scale": ({f"{M}.weight": U8, f"{M}.pre_quant_scale": torch.ones(16)}, {}, "whose inputs are rescaled"),
    "ModelOpt's stacks": (
        {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 32, 8, dtype=torch.uint8),
         "model.layers.0.mlp.experts.gate_up_proj_weight_scale": torch.zeros(2, 32, 1, dtype=torch.float8_e4m3fn),
         "model.layers.0.mlp.experts.gate_up_proj_weight_scale_2": torch.ones(2)},
        {},
        "ModelOpt in stacks of experts",
    ),
    "sparse": ({f"{M}.compressed": weight(16, 16), f"{M}.bitmask": U8}, {}, "sparse 2:4"),
    "rotated": (
        {f"{M}.weight": torch.zeros(16, 16, dtype=torch.float8_e4m3fn), f"{M}.weight_scale": torch.ones(1)},
        {"quantization_config": {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"x": 1}}}},
        "are rotated",
    ),
    "gpt-oss": (
        {
            "model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 8, 1, 16, dtype=torch.uint8),
            "model.layers.0.mlp.experts.gate_up_proj_scales": torch.zeros(2, 8, 1, dtype=torch.uint8),
        },
        said("mxfp4"),
        "no engine loads NVFP4 experts with a bias",
    ),
    "packed, no bits": (
        {f"{M}.weight_packed": torch.zeros(16, 4, dtype=torch.int32), f"{M}.weight_scale": torch.ones(16, 1)},
        {},
        "declares no num_bits",
    ),
    "packed, another order": (
        {
            f"{M}.weight_packed": torch.zeros(16, 4, dtype=torch.int32),
            f"{M}.weight_scale": torch.ones(16, 1),
            f"{M}.weight_g_idx": torch.zeros(32, dtype=torch.int32),
        },
        {},
        "another order of columns"
    ),
    "no scales at all": ({f"{M}.weight_packed": torch.zeros(16, 4, dtype=torch.int32)}, {}, "without the scales"),
    "MXFP4, half the scales": (
        {f"{M}.weight_packed": torch.zeros(16, 32, dtype=torch.uint8), f"{M}.weight_scale": torch.zeros(16, 1, dtype=torch.uint8)},
        {},
        r"expected \[16, 2\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_named(name: str, tmp_path: Path) -> None:
    tensors, config, message = REFUSED[name]
    source = write(tmp_path / "source", PLAIN | tensors, config=config)
    with pytest.raises(SourceError, match=message) as caught:
        mfptq.convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    tensors, config, _ = REFUSED["bitsandbytes named"]
    write(tmp_path / "source", PLAIN | tensors, config=config)
    done = command("plan", tmp_path / "source")
    assert done.returncode == 3
    assert done.stderr.startswith("mfptq: error: the source is quantized as 'bitsandbytes'")
    assert done.stderr.count("\n") == 1


def test_methods_do_not_matter_where_every_tensor_is_plain(tmp_path: Path) -> None:
    source = write(tmp_path / "source", PLAIN, config=said("bitsandbytes"))
    mfptq.convert(source, tmp_path / "out")
    assert mfptq.verify(tmp_path / "out", source).ok


def test_integers_that_are_no_weights_are_copied(tmp_path: Path) -> None:
    extra = {
        "position_ids": torch.arange(8)[None],
        "mask": torch.ones(4, 4, dtype=torch.uint8),
        "layer.scale": torch.ones(4),
    }
    source = write(tmp_path / "source", PLAIN | extra)
    mfptq.convert(source, tmp_path / "out")
    assert mfptq.verify(tmp_path / "out", source).ok


def test_a_config_that_says_otherwise_than_the_tensors_is_said(tmp_path: Path) -> None:
    codes = {f"{M}.weight": torch.ones(16, 32).to(torch.float8_e4m3fn), f"{M}.weight_scale_inv": torch.ones(1, 1)}
    source = write(tmp_path / "source", PLAIN | codes, config=said("fp8"))
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    [note] = [line for line in mfptq.inspect(source).notes if "the tensors decide" in line]
    assert note.startswith("hf_quant_config.json says 'modelopt NVFP4'")
