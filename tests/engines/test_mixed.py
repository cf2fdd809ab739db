"""The judge of engines finds no fault in outputs with several formats, which engines read by the names of their layers."""

from __future__ import annotations

from pathlib import Path

import pytest

import mfptq
from mfptq.demo import DemoShape, write_demo

from ..calibration.files import calibrate
from ..clients.deepseek_v4 import CONFIG, QUANTIZATION, release
from ..encodings.checkpoints import write

SHAPES = {
    "dense": DemoShape(hidden=256, intermediate=512, layers=4, vocabulary=64),
    "experts": DemoShape(hidden=128, intermediate=128, layers=4, experts=4, vocabulary=64),
}
DECISIONS: dict[str, dict] = {
    "attention in FP8": {"formats": ["fp8-dynamic=re:.*self_attn.*"]},
    "one layer in blocks": {"formats": ["fp8-block=re:.*layers.1.*out_proj$"]},
    "kept layer": {"formats": ["bf16=re:.*layers.2.mlp.*", "fp8-dynamic=re:.*o_proj$"]},
    "all FP8, and the cache": {"formats": ["fp8-dynamic=re:.*"], "ignore": ["re:.*mtp.*"], "kv_cache": "fp8"},
    "FP8 with fixed input scales": {"formats": ["fp8-static=re:.*self_attn.*"], "calibration": True},
    "recipe": {"recipe": "attention-fp8"},
    "recipe like NVIDIA's": {"recipe": "nvidia-qwen3.5", "calibration": True, "ignore": ["re:.*lm_head$"]},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DECISIONS)
def test_no_engine_refuses_a_mixture(tmp_path: Path, shape: str, name: str) -> None:
    write_demo(tmp_path / "source", SHAPES[shape])
    decisions = dict(DECISIONS[name])
    if decisions.pop("calibration", False):
        decisions["calibration"] = calibrate(tmp_path / "source", tmp_path / "calibration.safetensors")
    with mfptq.plan(tmp_path / "source", **decisions) as plan:
        found = [each for each in plan.check(engines=("vllm", "sglang")) if each.severity == "error"]
    assert not found, found


@pytest.mark.parametrize("formats", [[], [r"fp8-dynamic=re:.*attn\.(wq_a|wkv)$"]], ids=["default", "mixture"])
def test_no_engine_refuses_a_deepseek_v4(tmp_path: Path, formats: list[str]) -> None:
    """It calls experts w1, w2 and w3, which engines ask for by other names, and its drafter's blocks are renumbered."""
    folder = write(tmp_path / "source", release()[0], config=CONFIG | {"quantization_config": QUANTIZATION})
    with mfptq.plan(folder, formats=formats) as plan:
        found = [each for each in plan.check(engines=("vllm", "sglang")) if each.code != "no-tokenizer"]
        kept = {row.format for row in plan.tensors if row.name.startswith("mtp.")}
    assert not found, found
    assert kept == {""}
