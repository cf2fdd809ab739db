"""Strips: every value in one tile, every scale once, the same output whatever the memory."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mfptq
from mfptq.checkpoint.weights import Weight
from mfptq.execution import prepare, strips
from mfptq.execution.memory_budget import MemoryPlan


@pytest.mark.parametrize("segment", [(1, 0), (128, 128)])
@pytest.mark.parametrize("tile_bytes", [512, 4096, 2**16, 2**22])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (300, 208), (128, 128), (257, 1040)])
def test_tiles_cover_a_weight_once(segment: tuple[int, int], tile_bytes: int, rows: int, columns: int) -> None:
    weight = Weight("m", "s", "BF16", 0, rows, columns)
    seen, places = np.zeros((rows, columns), int), np.full((rows, columns), -1)
    scales = 0
    for strip in strips.strips(weight, segment, tile_bytes):
        assert strip.scale_index == scales
        scales += strip.shape[0] * strip.shape[1]
        for tile in strip.tiles:
            assert tile.nbytes <= tile_bytes
            seen.reshape(-1)[tile.start : tile.start + tile.size] += 1
            parts = strip.parts(tile)
            index = strip.scale_index + parts.rows[:, None] * strip.shape[1] + parts.columns
            flat = np.repeat(index.reshape(-1), np.diff(parts.starts))
            row, column = divmod(tile.start, columns)
            places[row : row + tile.rows, column : column + tile.columns] = flat.reshape(tile.rows, tile.columns)
    height, width = segment[0], segment[1] or columns
    expected = np.arange(rows)[:, None] // height * -(-columns // width) + np.arange(columns) // width
    assert (seen == 1).all()
    assert np.array_equal(places, expected)


@pytest.mark.parametrize("method", ["search", "minmax"])
@pytest.mark.parametrize("target", ["fp8-dynamic", "fp8-block"])
def test_memory_decides_nothing(target: str, method: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(1)
    shapes = {"o_proj": (257, 1040), "down_proj": (3, 200_000), "q_proj": (128, 128)}
    spread = {
        name: torch.exp2(torch.randint(-8, 8, (shape[0], 1), generator=rng).float()) for name, shape in shapes.items()
    }
    weights = {
        f"model.layers.0.mlp.{name}.weight": (torch.randn(shape, generator=rng) * spread[name]).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    (tmp_path / "source").mkdir()
    save_file(weights, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    (tmp_path / "source" / "config.json").write_text("{}")
    outputs = []
    for number, tile in enumerate((4 * 2**20, 2**18)):
        monkeypatch.setattr(prepare, "plan_memory", lambda *_, tile=tile, **__: MemoryPlan(2, tile, 0))
        mfptq.convert(tmp_path / "source", tmp_path / f"{number}", formats=[f"{target}=re:.*"], method=method)
        outputs.append((tmp_path / f"{number}" / "model.safetensors").read_bytes())
        assert mfptq.verify(tmp_path / f"{number}", tmp_path / "source").ok
    assert outputs[0] == outputs[1]
    stored = load_file(tmp_path / "0" / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
