"""Whatever the layout of a checkpoint, reading it by range gives the bytes that a folder gives, at any memory."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import mfptq
from mfptq.demo import write_demo
from tests.conftest import SMALL_EXPERTS, digests, sampled
from tests.hub.server import LoopbackHub


def shards(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name.endswith(".safetensors")}


def turned(folder: Path) -> None:
    """Write a GPT-2 like model, whose matrices are stored transposed."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shapes = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)}
    tensors = {
        f"transformer.h.{layer}.{name}.weight": (rng.standard_normal(shape) * 0.02).astype(np.float32)
        for layer in range(1)
        for name, shape in shapes.items()
    }
    tensors["transformer.wte.weight"] = rng.standard_normal((64, 32)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')


def experts(folder: Path) -> None:
    write_demo(folder, SMALL_EXPERTS)


@pytest.mark.parametrize(  # with tiles of a whole group, or of a part
    ("write", "tile"), sampled([(turned, 2**11), (experts, 2**18)], [(turned, 2**18), (experts, 2**11)])
)
def test_any_layout(write, tile: int, client: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfptq.execution import prepare

    write(tmp_path / "model")
    client.add(tmp_path / "model", "someone/layout")
    plan_memory = prepare.plan_memory
    monkeypatch.setattr(prepare, "plan_memory", lambda *args, **kwargs: _with(plan_memory(*args, **kwargs), tile))
    mfptq.convert("someone/layout", tmp_path / "out", max_workers=2)
    mfptq.convert(tmp_path / "model", tmp_path / "local", max_workers=2)
    assert shards(tmp_path / "out") == shards(tmp_path / "local")


def _with(memory, tile: int):
    from dataclasses import replace

    return replace(memory, tile_bytes=tile, spare=0 if tile < 2**16 else memory.spare)
