"""FP8 sources: every scale dtype and granularity against the vendors' formulas, and what must be refused."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from mfptq.checkpoint.encoding import Region
from mfptq.errors import SourceError, UnsupportedTensorError

from ..conftest import sampled
from .checkpoints import DECODERS, E8M0, FP8, decoded, deepseek, fp8_block, opened, same, spread, weight, write

SIZES = [16, 48, 128, 192, 300, 576]
SAMPLE = [
    (16, 48),
    (128, 128),
    (48, 576),
    (576, 16),
    (300, 192),
]  # within a block, one, a row and a column of them, cut ones
BLOCK = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, E8M0, torch.uint8], ids=str)
@pytest.mark.parametrize(("rows", "columns"), sampled(SAMPLE, sorted({*product(SIZES, SIZES)} - {*SAMPLE})))
def test_blocks_as_deepseek_casts_them(rows: int, columns: int, dtype: torch.dtype, tmp_path: Path) -> None:
    source = weight(rows, columns) * (1 if dtype != torch.float16 else 100)  # float16 scales must not underflow
    made = fp8_block(source, dtype=dtype)
    write(tmp_path, {"a.weight": made["weight"], "a.weight_scale_inv": made["scale"]}, config=BLOCK)
    for decoder in DECODERS:
        found = decoded(tmp_path, decoder)
        assert same(found["a.weight"], deepseek(made["weight"], made["scale"]))


@pytest.mark.parametrize(
    ("leaf", "block"), [("weight_scale", (128, 128)), ("scale", (32, 32)), ("qscale_weight", (64, 128))]
)
def test_other_names_and_sizes_of_blocks(leaf: str, block: tuple[int, int], tmp_path: Path) -> None:
    made = fp8_block(weight(300, 192), block)
    config = {"a": {"quantization_config": {"weight_block_size": list(block)}}}
    write(tmp_path, {"a.weight": made["weight"], f"a.{leaf}": made["scale"]}, config=config)
    assert same(decoded(tmp_path)["a.weight"], deepseek(made["weight"], made["scale"], block))


def test_compressed_tensors_writes_the_block_as_a_text_too(tmp_path: Path) -> None:
    made = fp8_block(weight(128, 192), (64, 64))
    groups = {"group_0": {"weights": {"strategy": "block", "block_structure": "64x64"}}}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}
    write(tmp_path, {"a.weight": made["weight"], "a.weight_scale": made["scale"]}, config=config)
    assert same(decoded(tmp_path)["a.weight"], deepseek(made["weight"], made["scale"], (64, 64)))


@pytest.mark.parametrize("shape", ["[]", "[1]", "[N]", "[N, 1]", "4-D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_tensors_and_of_rows(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    rows, columns = 300, 192
    source = weight(rows, columns)
    block = {"[]": (rows, columns), "[1]": (rows, columns), "4-D": (128, 128)}.get(shape, (1, columns))
    made = fp8_block(source, block, dtype)
    expected = deepseek(made["weight"], made["scale"], block)
    shapes = {"[]": (), "[1]": (1,), "[N]": (rows,), "[N, 1]": (rows, 1), "4-D": (3, 1, 2, 1)}
    scale = made["scale"].reshape(shapes[shape])
    inputs = {"a.input_scale": torch.tensor(0.01)}
    write(tmp_path, {"a.weight": made["weight"], "a.weight_scale": scale, **inputs})
    assert same(decoded(tmp_path)["a.weight"], expected)
    assert [tensor.info.name for tensor in opened(tmp_path)[1]] == ["a.weight"]


def test_mistrals_names(tmp_path: Path) -> None:
    made = fp8_block(weight(48, 64), (48, 64))
    tensors = {
        "a.weight": made["weight"],
        "a.weight_scale_inv": made["scale"][0, 0],
        "a.activation_scale": torch.tensor(0.5),
    }
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}}
    write(tmp_path, tensors, config=config)
    assert same(decoded(tmp_path)["a.weight"], deepseek(made["weight"], made["scale"], (48, 64)))


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("dtype", [E8M0, torch.uint8])
def test_mxfp8(leaf: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = fp8_block(weight(48, 576), (1, 32), dtype)
    write(tmp_path, {"a.weight": made["weight"], f"a.{leaf}": made["scale"]})
    for decoder in DECODERS:
        assert same(decoded(tmp_path, decoder)["a.weight"], deepseek(made["weight"], made["scale"], (1, 32)))
    assert "MXFP8" in next(iter(opened(tmp_path)[1].formats))


def test_stacks_of_experts_have_blocks_of_their_own(tmp_path: Path) -> None:
    parts = {"gate_up_proj": (192 * 2, 128), "down_proj": (128, 192)}
    tensors, expected = {}, {}
    for leaf, (rows, columns) in parts.items():
        made = [fp8_block(weight(rows, columns, seed)) for seed in range(3)]
        tensors[f"m.experts.{leaf}"] = torch.stack([each["weight"] for each in made])
        tensors[f"m.experts.{leaf}_scale_inv"] = torch.stack([each["scale"] for each in made])
        expected[f"m.experts.{leaf}"] = torch.stack([deepseek(each["weight"], each["scale"]) for each in made])
    write(tmp_path, tensors, config=BLOCK)
    found = decoded(tmp_path)
    assert all(same(found[name], expected[name]) for name in expected)


def test_any_region_is_a_part_of_the_whole(tmp_path: Path) -> None:
    made = fp8_block(weight(300, 576))
    write(tmp_path, {"a.weight": made["weight"], "a.weight_scale_inv": made["scale"]}, config=BLOCK)
    expected = deepseek(made["weight"], made["scale"]).view(torch.int16).numpy().view(np.uint16)
    checkpoint, contents = opened(tmp_path)
    [tensor] = contents
    for row, rows, column, columns in [
        (0, 300, 0, 576),
        (7, 200, 0, 576),
        (299, 1, 16, 128),
        (127, 2, 144, 400),
        (5, 1, 560, 16),
    ]:
        for decoder in DECODERS:
            out = np.empty(rows * columns, np.uint16)
            tensor.encoding.decode(checkpoint.source, Region(row, rows, column, columns), out, decoder)
            assert np.array_equal(out.reshape(rows, columns), expected[row : row + rows, column : column + columns])


def test_scales_in_another_shard(tmp_path: Path) -> None:
    made = fp8_block(weight(48, 64))
    write(tmp_path, {"a.weight": made["weight"]}, {"a.weight_scale_inv": made["scale"]}, config=BLOCK)
    assert same(decoded(tmp_path)["a.weight"], deepseek(made["weight"], made["scale"]))
    contents = opened(tmp_path)[1]
    assert contents.partners("model-00001-of-00002.safetensors") == set(contents.shards)
    assert contents.scale_bytes == 4


REFUSED = {
    "no scale": ({"a.weight": torch.zeros(16, 16, dtype=FP8)}, "without the scales"),
    "E5M2": ({"a.weight": torch.zeros(16, 16, dtype=torch.float8_e5m2), "a.weight_scale": torch.ones(1)}, "of FP8, only F8_E4M3 is read"),
    "orphan": ({"a.weight": weight(16, 16), "a.weight_scale_inv": torch.ones(1, 1)}, "is a scale without a weight"),
    "orphan alone": ({"b.weight": weight(16, 16), "a.weight_scale": torch.ones(1, 1)}, "is a scale without a weight"),
    "two scales": (
        {"a.weight": torch.zeros(16, 16, dtype=FP8), "a.weight_scale": torch.ones(1), "a.weight_scale_inv": torch.ones(1, 1)},
        "both scales of one weight",
    ),
    "576 rows cut into 4": (
        {"a.weight": torch.zeros(576, 128, dtype=FP8), "a.weight_scale_inv": torch.ones(4, 1)},
        r"expected \[5, 1\] for blocks of 128x128",
    ),
    "scales of 8 bits that are numbers": (
        {"a.weight": torch.zeros(16, 16, dtype=FP8), "a.weight_scale": torch.ones(1, dtype=torch.float64)},
        "is F64, expected one of",
    ),
    "zero points": (
        {"a.weight": torch.zeros(16, 16, dtype=FP8), "a.weight_scale": torch.ones(1), "a.weight_zero_point": torch.ones(1)},
        "is not zero",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_incomplete_or_contradictory_is_refused(name: str, tmp_path: Path) -> None:
    tensors, message = REFUSED[name]
    with pytest.raises(SourceError, match=message):
        opened(write(tmp_path, tensors))


def test_no_weight_of_eight_bits_passes_because_it_is_kept(tmp_path: Path) -> None:
    tensors = {"a.weight": weight(16, 16), "mtp.fc.weight": torch.zeros(16, 16, dtype=FP8)}
    with pytest.raises(UnsupportedTensorError, match=r"'mtp.fc.weight' .* is F8_E4M3"):
        opened(write(tmp_path, tensors))


def test_zero_points_that_are_zero_are_dropped(tmp_path: Path) -> None:
    made = fp8_block(weight(16, 16), (1, 16))
    tensors = {
        "a.weight": made["weight"],
        "a.weight_scale": made["scale"],
        "a.weight_zero_point": torch.zeros(16, 1).to(FP8),
    }
    assert [tensor.info.name for tensor in opened(write(tmp_path, tensors))[1]] == ["a.weight"]


def test_the_block_comes_from_the_config_where_shapes_fit_two(tmp_path: Path) -> None:
    """192 rows and 2 scales fit blocks of 128 and of 96: transformers would take 96 of them, and be wrong in 32 rows."""
    made = fp8_block(weight(192, 128))
    write(tmp_path, {"a.weight": made["weight"], "a.weight_scale_inv": made["scale"]}, config=BLOCK)
    assert same(decoded(tmp_path)["a.weight"], deepseek(made["weight"], made["scale"]))
    guessed = (made["weight"].float() * spread(made["scale"], (96, 128), (192, 128))).to(torch.bfloat16)
    assert not same(decoded(tmp_path)["a.weight"], guessed)
    write(tmp_path, {"a.weight": made["weight"], "a.weight_scale_inv": made["scale"]},
          config={"quantization_config": {"weight_block_size": [64, 64]}})  # fmt: skip
    with pytest.raises(SourceError, match=r"expected \[3, 2\] for blocks of 64x64"):
        opened(tmp_path)


def test_two_configs_that_fit_in_different_ways_are_an_error(tmp_path: Path) -> None:
    config = {
        "quantization_config": {"weight_block_size": [128, 128]},
        "b": {"quantization_config": {"weight_block_size": [100, 128]}},
    }
    made = fp8_block(weight(192, 128))
    with pytest.raises(SourceError, match="which the config both declares"):
        opened(write(tmp_path, {"a.weight": made["weight"], "a.weight_scale_inv": made["scale"]}, config=config))


def test_notes_say_what_is_stored_how(tmp_path: Path) -> None:
    made = fp8_block(weight(48, 64))
    tensors = {"a.weight": made["weight"], "a.weight_scale_inv": made["scale"], "a.k_scale": torch.tensor(1.0)}
    contents = opened(write(tmp_path, tensors))[1]
    assert contents.notes == (
        "1 weight is stored as FP8 E4M3, F32 scale per tensor",
        "no config tells of this quantization: the tensors decide",
        "1 scale of the key-value cache goes over if that is kept in FP8",
    )


def test_the_oracles_of_other_projects(tmp_path: Path) -> None:
    """compressed-tensors' block dequantizer, and transformers', where its guess of the block is right."""
    from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    for rows, columns in ((256, 384), (300, 192)):
        made = fp8_block(weight(rows, columns))
        tensors = {"a.weight": made["weight"], "a.weight_scale_inv": made["scale"]}
        ours = decoded(write(tmp_path, tensors, config=BLOCK))["a.weight"]
        theirs = FP8BlockDequantizer(targets=["re:.*"]).process(dict(tensors))["a.weight"]
        assert same(ours, theirs)
        if rows % 128 == columns % 128 == 0:
            transformers = Fp8Dequantize(None)._dequantize_one(made["weight"], made["scale"], torch.bfloat16)
            assert same(ours, transformers)
