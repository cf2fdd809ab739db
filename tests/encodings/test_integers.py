"""Packed integers with zero points, beside compressed-tensors' own unpacking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

import mfptq
from mfptq.checkpoint.encoding import Region
from mfptq.encodings.codes import scale_codes
from mfptq.errors import SourceError

from .checkpoints import Tensors, decoded, opened, same, weight, write


def config(bits: int, group: int) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": weights}},
        }
    }


def asymmetric(rows: int, columns: int, bits: int, group: int) -> tuple[Tensors, torch.Tensor]:
    """Return what is stored of a random weight, and its values."""
    generator = torch.Generator().manual_seed(rows + columns)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
    zeros = torch.randint(low, high, (rows, columns // group), generator=generator, dtype=torch.int8)
    scales = (torch.rand(rows, columns // group, generator=generator) * 0.01).to(torch.bfloat16)
    wide = [each.repeat_interleave(group, 1).float() for each in (zeros, scales)]
    packed = pack_to_int32(codes, bits)
    packed_zeros = pack_to_int32(zeros, bits, packed_dim=0).contiguous()
    assert torch.equal(unpack_from_int32(packed_zeros, bits, torch.Size(zeros.shape), packed_dim=0), zeros)
    tensors = {"weight_packed": packed, "weight_scale": scales, "weight_zero_point": packed_zeros,
               "weight_shape": torch.tensor([rows, columns])}  # fmt: skip
    return tensors, ((codes.float() - wide[0]) * wide[1]).to(torch.bfloat16)


def named(tensors: Tensors) -> Tensors:
    return {f"a.{leaf}": values for leaf, values in tensors.items()}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(16, 32, 32), (44, 320, 32), (136, 64, 64), (24, 96, 16)])
def test_values_are_codes_less_zero_points_times_scales(
    bits: int, rows: int, columns: int, group: int, tmp_path: Path
) -> None:
    tensors, expected = asymmetric(rows, columns, bits, group)
    write(tmp_path, named(tensors), config=config(bits, group))
    assert same(decoded(tmp_path)["a.weight"], expected)
    assert "with zero points" in opened(tmp_path)[1].notes[0]


@pytest.mark.parametrize(
    "region", [Region(0, 44, 0, 320), Region(5, 3, 0, 320), Region(7, 20, 16, 64), Region(43, 1, 48, 16)]
)
def test_any_region_is_a_part_of_the_whole(region: Region, tmp_path: Path) -> None:
    tensors, expected = asymmetric(44, 320, 4, 32)
    checkpoint, contents = opened(write(tmp_path, named(tensors), config=config(4, 32)))
    [tensor] = contents
    out = np.empty(region.size, np.uint16)
    assert tensor.encoding is not None
    tensor.encoding.decode(checkpoint.source, region, out, scale_codes)
    rows, columns = slice(region.row, region.row + region.rows), slice(region.column, region.column + region.columns)
    assert same(torch.from_numpy(out).view(torch.bfloat16), expected[rows, columns].reshape(-1))
    checkpoint.source.close()


def test_converting_it_is_converting_its_values(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    tensors, expected = asymmetric(64, 128, 4, 32)
    stored = {f"{name}.{leaf}": values for leaf, values in tensors.items()}
    source = write(tmp_path / "source", stored, config=config(4, 32))
    mfptq.convert(source, tmp_path / "out")
    mfptq.convert(write(tmp_path / "plain", {f"{name}.weight": expected}), tmp_path / "other")
    one, other = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "other"))
    assert one == other


def test_zero_points_of_another_shape_are_refused(tmp_path: Path) -> None:
    tensors, _ = asymmetric(64, 128, 4, 32)
    tensors["weight_zero_point"] = torch.zeros(64, 4, dtype=torch.int8)
    write(tmp_path, {**named(tensors), "b.weight": weight(16, 32)}, config=config(4, 32))
    with pytest.raises(SourceError, match=r"expected zero points of 4 bits packed into I32 \[8, 4\]"):
        opened(tmp_path)
