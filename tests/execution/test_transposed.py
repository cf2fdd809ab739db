"""Matrices that are stored transposed: transposed back while they are read, to the bytes of the same matrix stored plainly."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mfptq
from mfptq.checkpoint.folder import Origin, read_checkpoint
from mfptq.errors import NonFiniteWeightError

from ..calibration.files import calibrate, described
from ..conftest import sampled

HIDDEN, INNER, EXPERTS = 64, 48, 3
P = "model.layers.0."


def stored(folder: Path) -> dict[str, bytes]:
    """Return every tensor of an output, as bytes."""
    checkpoint = read_checkpoint(Origin(folder))
    files = {shard.name: (folder / shard.name).read_bytes() for shard in checkpoint.shards}
    found = {t.info.name: files[t.shard][t.offset : t.offset + t.info.nbytes] for t in checkpoint.tensors()}
    checkpoint.source.close()
    return found


def write(folder: Path, tensors: dict[str, np.ndarray] | dict[str, torch.Tensor], config: dict) -> Path:
    folder.mkdir()
    save_file(
        {name: torch.as_tensor(value).contiguous() for name, value in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def experts(hidden: int, inner: int, *, turned: bool, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(1)
    stacks = {
        "gate_up_proj": rng.standard_normal((EXPERTS, 2 * inner, hidden)),
        "down_proj": rng.standard_normal((EXPERTS, hidden, inner)),
    }
    return {
        f"{P}mlp.experts.{name}": torch.from_numpy(value.transpose(0, 2, 1) if turned else value).to(dtype)
        for name, value in stacks.items()
    }


def converted(tmp_path: Path, tensors: Callable[..., dict], config: dict, **options: object) -> list[dict[str, bytes]]:
    """Return the tensors of plain and of transposed experts, converted and verified."""
    outputs = []
    for turned in (False, True):
        source = write(tmp_path / f"source-{turned}", tensors(turned=turned), config)
        mfptq.convert(source, tmp_path / f"out-{turned}", **options)
        assert mfptq.verify(tmp_path / f"out-{turned}", source).ok
        outputs.append(stored(tmp_path / f"out-{turned}"))
    assert any(name.startswith(f"{P}mlp.experts.2.up_proj.weight") for name in outputs[0])
    return outputs


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiles of transposed matrices have half a MiB: 1024 x 256 values of 4 bytes take two."""
    monkeypatch.setattr("mfptq.kernels.cpu.CpuKernel.tile_bytes", 2**18)


METHODS = [("search", torch.float32), ("search", torch.bfloat16), ("minmax", torch.float16)]
BATCHES = [(HIDDEN, INNER, *each) for each in METHODS]
IN_TILES = [(1024, 256, *each) for each in METHODS]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("hidden", "inner", "method", "dtype"), sampled([*BATCHES, IN_TILES[0]], IN_TILES[1:]))
def test_transposed_experts_have_the_bytes_of_plain_ones(
    hidden: int, inner: int, method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = {"num_hidden_layers": 1, "hidden_size": hidden}
    tensors = partial(experts, hidden, inner, dtype=dtype)
    plain, found = converted(tmp_path, tensors, config, method=method, max_memory="400MB")
    assert plain == found


@pytest.mark.parametrize("workers", sampled([3], [1]))
@pytest.mark.parametrize(
    ("hidden", "inner", "tile"),
    [(80, 1040, 6000), (80, 1040, 2**16), (1072, 112, 2**14), (1072, 112, 2**20), (144, 48, 512)],
)
def test_tiles_may_end_anywhere(
    hidden: int, inner: int, tile: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that fill no block, columns that fill no cache line, parts of rows, gaps of many bytes and of few."""
    monkeypatch.setattr("mfptq.execution.memory_budget.MIN_TILE", tile)
    monkeypatch.setattr("mfptq.execution.prepare.TALLER", 1)
    monkeypatch.setattr("mfptq.kernels.cpu.CpuKernel.tile_bytes", tile)
    config = {"num_hidden_layers": 1, "hidden_size": hidden}
    tensors = partial(experts, hidden, inner, dtype=torch.bfloat16)
    plain, found = converted(tmp_path, tensors, config, max_workers=workers)
    assert plain == found


@pytest.mark.parametrize(
    "decisions", [{"method": "hessian+"}, {"method": "gptq"}, {"formats": ["fp8-dynamic=re:.*experts.*"]}]
)
def test_other_methods_and_formats_are_given_the_same_values(
    decisions: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mfptq.execution.memory_budget.MIN_TILE", 2**15)
    monkeypatch.setattr("mfptq.execution.prepare.TALLER", 1)
    monkeypatch.setattr("mfptq.kernels.cpu.CpuKernel.tile_bytes", 2**15)
    config = {"num_hidden_layers": 1, "hidden_size": 128}
    tensors = partial(experts, 128, 240, dtype=torch.bfloat16)
    if "method" in decisions:
        plain = write(tmp_path / "plain", tensors(turned=False), config)
        decisions["calibration"] = calibrate(plain, tmp_path / "calibration.safetensors", described("factors"))
    plain, found = converted(tmp_path, tensors, config, **decisions)
    assert plain == found


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("hidden", "inner"), [(HIDDEN, INNER), (1024, 256)], ids=["batches", "tiles"])
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
