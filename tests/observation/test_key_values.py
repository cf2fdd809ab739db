"""Ranges of keys and values: those of the model's own attention, unchanged by looking at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import mfptq
from mfptq.calibration.merge import merge_calibrations
from mfptq.calibration.reading import load_calibration
from mfptq.observation import calibration_pass, residency
from tests.clients.test_transformers import IS_CURRENT
from tests.models import DENSE, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "source", DENSE)


def texts(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    path.write_text("\n".join(json.dumps(rng.integers(0, 256, 20).tolist()) for _ in range(2)))
    return path


def ranges(folder: Path, text: Path, output: Path) -> dict[str, tuple[float, float]]:
    mfptq.calibrate(folder, text, output, samples=2, statistics="amax", dtype="float32")
    with_file = load_calibration(output)
    found = with_file.key_value_ranges()
    with_file.close()
    return found


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    return texts(folder.with_name("a.jsonl"), 0)


@pytest.fixture(scope="module")
def whole(folder: Path, one: Path) -> tuple[Path, dict[str, tuple[float, float]]]:
    """The calibration of the first text, and the ranges in it."""
    output = folder.with_name("a.calibration.safetensors")
    return output, ranges(folder, one, output)


@pytest.mark.skipif(not IS_CURRENT, reason="a model of transformers before 5.24 takes its cache by another name")
def test_they_are_those_that_a_cache_holds(folder: Path, one: Path, whole: tuple[Path, Any]) -> None:
    found = whole[1]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected: dict[int, list[float]] = {}
    for line in one.read_text().splitlines():
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(torch.tensor([json.loads(line)]), cache=cache, use_cache=True)
        for number, layer in enumerate(cache.layers):
            if isinstance(getattr(layer, "keys", None), torch.Tensor):
                pair = [float(layer.keys.abs().max()), float(layer.values.abs().max())]
                expected[number] = [max(each) for each in zip(pair, expected.get(number, [0, 0]), strict=True)]
    assert found.keys() == {f"model.language_model.layers.{n}.self_attn.k_proj" for n in expected} != set()
    for number, pair in expected.items():
        assert found[f"model.language_model.layers.{number}.self_attn.k_proj"] == pytest.approx(pair, rel=1e-4)


def test_a_streamed_model_gives_the_same_and_a_merge_the_larger(
    folder: Path, one: Path, whole: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, first), two = whole, texts(tmp_path / "b.jsonl", 1)
    second = ranges(folder, two, tmp_path / "b.calibration.safetensors")
    merge_calibrations([path, tmp_path / "b.calibration.safetensors"], tmp_path / "c.safetensors")
    both = load_calibration(tmp_path / "c.safetensors")
    assert both.key_value_ranges() == {
        name: tuple(max(each) for each in zip(first[name], second[name], strict=True)) for name in first
    }
    both.close()
    monkeypatch.setattr(calibration_pass, "choose_residency", lambda *_: residency.Residency(streamed=True, batch=2))
    assert ranges(folder, one, tmp_path / "d.calibration.safetensors") == first


def test_an_interrupted_run_keeps_them(folder: Path, one: Path, whole: tuple[Path, Any], tmp_path: Path) -> None:
    output = tmp_path / "a.calibration.safetensors"

    class Stop(Exception):
        pass

    def stop(event: mfptq.CalibrationProgress) -> None:
        if event.samples == 1:
            raise Stop

    with pytest.raises(Stop):
        mfptq.calibrate(folder, one, output, samples=2, statistics="amax", dtype="float32", batch_size=1, on_event=stop)
    assert ranges(folder, one, output) == whole[1]
