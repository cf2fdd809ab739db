"""Matrices that are stored transposed: turned while they are read, to the bytes of the same matrix stored plainly."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import mfptq
from mfptq.checkpoint.folder import Origin, read_checkpoint
from mfptq.errors import NonFiniteWeightError

HIDDEN, INNER, EXPERTS = 64, 48, 3
P = "model.layers.0."


def stored(folder: Path) -> dict[str, bytes]:
    """Return every tensor of an output, as bytes."""
    checkpoint = read_checkpoint(Origin(folder))
    files = {shard.name: (folder / shard.name).read_bytes() for shard in checkpoint.shards}
    found = {t.info.name: files[t.shard][t.offset : t.offset + t.info.nbytes] for t in checkpoint.tensors()}
    checkpoint.source.close()
    return found


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict) -> Path:
    folder.mkdir()
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def experts(hidden: int, inner: int, *, turned: bool, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    stacks = {
        "gate_up_proj": rng.standard_normal((EXPERTS, 2 * inner, hidden)),
        "down_proj": rng.standard_normal((EXPERTS, hidden, inner)),
    }
    return {
        f"{P}mlp.experts.{name}": (value.transpose(0, 2, 1) if turned else value).astype(dtype)
        for name, value in stacks.items()
    }


@pytest.mark.parametrize(("method", "dtype"), [("search", np.float32), ("minmax", np.float16)])
@pytest.mark.parametrize(("hidden", "inner"), [(HIDDEN, INNER), (2048, 1024)], ids=["batches", "tiles"])
def test_turned_experts_have_the_bytes_of_plain_ones(
    hidden: int, inner: int, method: str, dtype: type, tmp_path: Path
) -> None:
    config = {"num_hidden_layers": 1, "hidden_size": hidden}
    outputs = []
    for turned in (False, True):
        source = write(tmp_path / f"source-{turned}", experts(hidden, inner, turned=turned, dtype=dtype), config)
        output = tmp_path / f"out-{turned}"
        mfptq.convert(source, output, method=method, max_memory="400MB")
        assert mfptq.verify(output, source).ok
        outputs.append(stored(output))
    plain, found = outputs
    assert f"{P}mlp.experts.2.up_proj.weight_packed" in plain
    assert plain == found


@pytest.mark.parametrize(("hidden", "inner"), [(HIDDEN, INNER), (2048, 1024)], ids=["batches", "tiles"])
@pytest.mark.parametrize("leaf", ["up_proj", "down_proj"])
def test_a_wrong_value_is_found_where_it_lies(leaf: str, hidden: int, inner: int, tmp_path: Path) -> None:
    tensors = experts(hidden, inner, turned=True)
    if leaf == "down_proj":
        tensors[f"{P}mlp.experts.down_proj"][1, 5, 7] = np.nan  # expert 1, column 5, row 7
    else:
        tensors[f"{P}mlp.experts.gate_up_proj"][1, 5, inner + 7] = np.nan
    columns = inner if leaf == "down_proj" else hidden
    source = write(tmp_path / "source", tensors, {})
    with pytest.raises(NonFiniteWeightError, match=rf"experts\.1\.{leaf}.*flat index {7 * columns + 5}:"):
        mfptq.convert(source, tmp_path / "out")


def test_conv1d_of_gpt2_is_turned(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64), "mlp.c_fc": (64, 256), "mlp.c_proj": (256, 64)}
    tensors = {f"h.0.{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    plain = {name: value.T for name, value in tensors.items()}
    outputs = []
    for kind, values in (("gpt2", tensors), ("gpt_bigcode", plain)):
        source = write(tmp_path / kind, values, {"model_type": kind, "n_layer": 1})
        mfptq.convert(source, tmp_path / f"{kind}-out")
        assert mfptq.verify(tmp_path / f"{kind}-out", source).ok
        outputs.append(stored(tmp_path / f"{kind}-out"))
    assert len(outputs[0]["h.0.attn.c_attn.weight_packed"]) == 192 * 32
    assert outputs[0] == outputs[1]
