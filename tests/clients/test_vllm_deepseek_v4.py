"""vLLM's own class for DeepSeek-V4, the one for NVIDIA's GPUs, and its loader on a conversion of a tiny release.

It is built on a processor: what asks for a GPU in constructors is replaced, and nothing runs. vLLM's class for processors renames
`weight_scale` to `weight_scale_inv`, for files of AMD's Quark, and so does not load compressed-tensors; nor has it a drafter.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
pytest.importorskip("vllm.models.deepseek_v4")

import torch

from tests.clients.deepseek_v4 import CONFIG, QUANTIZATION, release
from tests.clients.dequantize import write_twin
from tests.clients.vllm_loading import load, prepare_vllm, unfilled, weights
from tests.conftest import command
from tests.encodings.checkpoints import write

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
QUANTIZED = {"fused_wqa_wkv", "wq_b", "wo_b", "gate_up_proj", "down_proj", "w13_weight", "w2_weight"}


class _NoDevice:
    """Stands for CUDA streams and events, which the class makes and nothing uses."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take what a stream or an event takes."""


@pytest.fixture(autouse=True)
def class_for_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_vllm(monkeypatch)
    import vllm.models.deepseek_v4 as chosen
    from vllm.models.deepseek_v4.nvidia import flashmla, model, mtp

    monkeypatch.setattr(torch.cuda, "Stream", _NoDevice)
    monkeypatch.setattr(torch.cuda, "Event", _NoDevice)
    monkeypatch.setattr(flashmla, "compute_fp8_einsum_recipe", lambda *_: ((1, 128, 128), False))
    monkeypatch.setattr(chosen, "DeepseekV4ForCausalLM", model.DeepseekV4ForCausalLM)
    monkeypatch.setattr(chosen, "DeepSeekV4MTP", mtp.DeepSeekV4MTP)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return a release, its bfloat16 cast, and its conversion."""
    stored, cast = release()
    source = write(tmp_path / "source", stored, config=CONFIG | {"quantization_config": QUANTIZATION})
    plain = write(
        tmp_path / "plain", cast, config={key: value for key, value in CONFIG.items() if key != "expert_dtype"}
    )
    out = tmp_path / "out"
    result = command(
        "convert", source, out
    )  # in a process of its own: vLLM's search in loaded modules fails on llvmlite's
    assert result.returncode == 0, result.stderr
    return source, plain, out


def test_every_parameter_is_the_twins_and_experts_are_the_sources(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, plain, out = folders
    parameters = load(out)
    packed = {name.split(".")[-2] if name.endswith(".weight_packed") else name.split(".")[-1].removesuffix("_packed")
              for name in parameters if name.endswith("_packed")}  # fmt: skip
    assert packed == QUANTIZED
    assert not unfilled(parameters)
    found = weights(parameters)
    expected = load(write_twin(out, plain, tmp_path / "twin", stacked=False))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    cast = load(plain)
    same = {name for name in cast if torch.equal(found[name], cast[name])}
    assert {name for name in cast if "routed_experts" in name} <= same  # MXFP4 went over as it was
    assert {name.split(".")[-2] for name in cast.keys() - same} == {
        "fused_wqa_wkv", "wq_b", "wo_b", "gate_up_proj", "down_proj",
    }  # fmt: skip


def test_the_drafter_loads_as_the_source_has_it(folders: tuple[Path, Path, Path]) -> None:
    _, plain, out = folders
    found, expected = load(out, drafter=True), load(plain, drafter=True)
    assert not unfilled(found)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
