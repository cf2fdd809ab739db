"""The judge of engines finds no fault in outputs with several formats, which engines read by the names of their layers."""

from __future__ import annotations

from pathlib import Path

import pytest

import mfptq
from mfptq.demo import DemoShape, write_demo

from ..calibration.files import calibrate

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
