"""The judge of engines finds no fault in outputs with several formats, which engines read by the names of their layers."""

from __future__ import annotations

from pathlib import Path

import pytest

import mfptq
from mfptq.demo import DemoShape, write_demo

from ..calibration.files import calibrate
from ..clients.deepseek_v4 import CONFIG, QUANTIZATION, release
from ..encodings.checkpoints import write

HEADS = 8  # the weights of attention are much the largest
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


@pytest.fixture(scope="module", params=SHAPES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of each shape, and its calibration."""
    folder = tmp_path_factory.mktemp(request.param)
    write_demo(folder / "source", SHAPES[request.param])
    return folder / "source", calibrate(folder / "source", folder / "calibration.safetensors")


@pytest.mark.parametrize("name", DECISIONS)
def test_no_engine_refuses_a_mixture(made: tuple[Path, Path], name: str) -> None:
    source, calibration = made
    decisions = dict(DECISIONS[name])
    if decisions.pop("calibration", False):
        decisions["calibration"] = calibration
    with mfptq.plan(source, **decisions) as plan:
        found = [each for each in plan.check(engines=("vllm", "sglang")) if each.severity == "error"]
    assert not found, found


@pytest.mark.parametrize("formats", [[], [r"fp8-dynamic=re:.*attn\.(wq_a|wkv)$"]], ids=["default", "mixture"])
def test_no_engine_refuses_a_deepseek_v4(tmp_path: Path, formats: list[str]) -> None:
    """It calls experts w1, w2 and w3, which engines ask for by other names, and its drafter's blocks are renumbered."""
    config = CONFIG | {"num_attention_heads": HEADS, "quantization_config": QUANTIZATION}
    folder = write(tmp_path / "source", release(heads=HEADS)[0], config=config)
    with mfptq.plan(folder, formats=formats) as plan:
        found = [each for each in plan.check(engines=("vllm", "sglang")) if each.code != "no-tokenizer"]
        kept = {row.format for row in plan.tensors if row.name.startswith("mtp.")}
    assert not found, found
    assert kept == {""}
