"""AWQ and GPTQ, packed here code by code, against what the package reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mfptq
from mfptq.checkpoint.encoding import Region
from mfptq.encodings.codes import scale_codes
from mfptq.errors import SourceError

from ..calibration.files import stored
from .checkpoints import Tensors, decoded, opened, same, write

AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}}
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def packed(codes: np.ndarray, order: list[int], axis: int) -> torch.Tensor:
    """Pack eight codes along an axis into a word, one after the other, each into the nibble that `order` names."""
    moved = np.moveaxis(codes.astype(np.int64), axis, -1)
    words = np.zeros((*moved.shape[:-1], moved.shape[-1] // 8), np.int64)
    for place in range(8):
        words |= moved[..., place::8] << 4 * order[place]
    return torch.from_numpy(np.moveaxis(words, -1, axis).astype(np.uint32).view(np.int32).copy())


def awq(rows: int, columns: int, group: int = 32, seed: int = 0) -> tuple[Tensors, torch.Tensor]:
    rng = np.random.default_rng(seed)
    codes, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(0, 16, (columns // group, rows))
    scales = torch.from_numpy((rng.random((columns // group, rows)) * 0.02).astype(np.float16))
    tensors = {"qweight": packed(codes, ORDER, 1), "qzeros": packed(zeros, ORDER, 1), "scales": scales}
    values = (codes - zeros.repeat(group, 0)) * scales.float().numpy().repeat(group, 0)
    return tensors, torch.from_numpy(values.astype(np.float32).T.copy()).to(torch.bfloat16)


def gptq(rows: int, columns: int, version: str, *, act_order: bool) -> tuple[Tensors, torch.Tensor]:
    rng, group = np.random.default_rng(1), 32
    codes, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(1, 16, (columns // group, rows))
    scales = torch.from_numpy((rng.random((columns // group, rows)) * 0.02).astype(np.float16))
    index = np.arange(columns) // group
    if act_order:
        rng.shuffle(index)
    kept = zeros if version == "gptq_v2" else zeros - 1
    tensors = {
        "qweight": packed(codes, list(range(8)), 0), "qzeros": packed(kept, list(range(8)), 1), "scales": scales,
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }  # fmt: skip
    values = (codes - zeros[index]) * scales.float().numpy()[index]
    return tensors, torch.from_numpy(values.astype(np.float32).T.copy()).to(torch.bfloat16)


def named(tensors: Tensors, module: str = "a") -> Tensors:
    return {f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()}


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 320), (136, 64)])
def test_awq(rows: int, columns: int, tmp_path: Path) -> None:
    tensors, expected = awq(rows, columns)
    write(tmp_path, named(tensors), config={"llm_config": AWQ})
    assert same(decoded(tmp_path)["a.weight"], expected)
    assert opened(tmp_path)[1].notes[0] == "1 weight is stored as AWQ INT4, F16 scale per 32 columns"


def test_awq_as_compressed_tensors_reads_it(tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    tensors, expected = awq(64, 128)
    write(tmp_path, named(tensors), config=AWQ)
    theirs = AutoAWQConverter(group_size=32, zero_point=True, bits=4, targets=["re:.*"]).process(named(tensors))
    codes = unpack_from_int32(theirs["a.weight_packed"], 4, torch.Size([64, 128])).float()
    zeros = unpack_from_int32(theirs["a.weight_zero_point"], 4, torch.Size([64, 4]), packed_dim=0).float()
    values = (codes - zeros.repeat_interleave(32, 1)) * theirs["a.weight_scale"].float().repeat_interleave(32, 1)
    assert same(decoded(tmp_path)["a.weight"], expected)
    assert same(values.to(torch.bfloat16), expected)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(version: str, act_order: bool, tmp_path: Path) -> None:
    tensors, expected = gptq(48, 320, version, act_order=act_order)
    config = {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": version, "desc_act": act_order}
    }
    write(tmp_path, named(tensors), config=config)
    assert same(decoded(tmp_path)["a.weight"], expected)


@pytest.mark.parametrize("build", [lambda: awq(136, 320), lambda: gptq(136, 320, "gptq", act_order=True)])
def test_any_region_is_a_part_of_the_whole(build, tmp_path: Path) -> None:
    tensors, expected = build()
    config = AWQ if tensors["qweight"].shape == (320, 17) else {"quantization_config": {"quant_method": "gptq"}}
    write(tmp_path, named(tensors), config=config)
    checkpoint, contents = opened(tmp_path)
    [tensor] = contents
    whole = expected.view(torch.int16).numpy().view(np.uint16)
    for row, rows, column, columns in [(0, 136, 0, 320), (3, 70, 0, 320), (135, 1, 16, 160), (9, 2, 48, 272)]:
        out = np.empty(rows * columns, np.uint16)
        tensor.encoding.decode(checkpoint.source, Region(row, rows, column, columns), out, scale_codes)
        assert np.array_equal(out.reshape(rows, columns), whole[row : row + rows, column : column + columns])


def test_a_release_converts_to_what_its_cast_converts_to(tmp_path: Path) -> None:
    shapes = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "mlp.down_proj": (64, 128),
    }
    release, cast = {}, {}
    for seed, (leaf, (rows, columns)) in enumerate(shapes.items()):
        name = f"model.layers.0.{leaf}"
        tensors, values = awq(rows, columns, seed=seed)
        release |= named(tensors, name)
        cast[f"{name}.weight"] = values
    for folder, tensors, config in (("release", release, AWQ), ("cast", cast, {})):
        write(tmp_path / folder, tensors, config=config)
        mfptq.convert(tmp_path / folder, tmp_path / f"{folder}-out")
    one, other = stored(tmp_path / "release-out"), stored(tmp_path / "cast-out")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)
    assert mfptq.verify(tmp_path / "release-out", tmp_path / "release").ok


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "of version 'gemv' in the config, expected 'gemm'"),
        ({"quant_method": "gptq", "bits": 4}, "as awq does, but the config says 'gptq'"),
        ({"quant_method": "awq", "bits": 8}, "is of 8 bits"),
        ({"quant_method": "awq", "bits": 4}, "of no version in the config, expected 'gemm'"),
    ],
)
def test_variants_that_look_alike_are_refused(config: dict, message: str, tmp_path: Path) -> None:
    tensors, _ = awq(16, 32)
    with pytest.raises(SourceError, match=message):
        opened(write(tmp_path, named(tensors), config={"quantization_config": config}))


GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"checkpoint_format": "marlin"}, "GPTQ packed as 'marlin', expected 'gptq' or 'gptq_v2'"),
        ({"is_marlin_format": True}, "GPTQ packed as 'marlin'"),
        ({"desc_act": True}, "has no g_idx, but desc_act in the config"),
    ],
)
def test_gptq_that_would_be_read_wrongly_is_refused(config: dict, message: str, tmp_path: Path) -> None:
    tensors, _ = gptq(16, 64, "gptq", act_order=False)
    del tensors["g_idx"]
    with pytest.raises(SourceError, match=message):
        opened(write(tmp_path, named(tensors), config={"quantization_config": GPTQ | config}))


def test_gptqmodels_own_word_for_the_form_of_zero_points(tmp_path: Path) -> None:
    tensors, expected = gptq(16, 64, "gptq_v2", act_order=False)
    write(tmp_path, named(tensors), config={"quantization_config": GPTQ | {"format": "gptq_v2"}})
    assert same(decoded(tmp_path)["a.weight"], expected)


@pytest.mark.parametrize(
    ("build", "file", "content"),
    [
        (lambda: gptq(16, 64, "gptq", act_order=False), "quantize_config.json", '{"bits": 4, "desc_act": false}'),
        (lambda: awq(16, 64), "quant_config.json", '{"w_bit": 4, "q_group_size": 32, "version": "GEMM"}'),
    ],
    ids=["AutoGPTQ", "AutoAWQ"],
)
def test_old_releases_say_it_in_a_file_of_their_tool(build, file: str, content: str, tmp_path: Path) -> None:
    tensors, expected = build()
    write(tmp_path, named(tensors))
    (tmp_path / file).write_text(content)
    assert same(decoded(tmp_path)["a.weight"], expected)


def test_shapes_that_fit_neither_are_refused(tmp_path: Path) -> None:
    tensors, _ = awq(16, 64)
    tensors["scales"] = tensors["scales"][:, :8].contiguous()
    with pytest.raises(SourceError, match="expected what AWQ or GPTQ store in 4 bits"):
        opened(write(tmp_path, named(tensors), config=AWQ))
    tensors, _ = gptq(16, 64, "gptq", act_order=False)
    with pytest.raises(SourceError, match="no config says how its zero points are"):
        opened(write(tmp_path, named(tensors)))
