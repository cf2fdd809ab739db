"""Every model type that transformers builds tiny and vLLM has a class for: its conversion loads, with the twin's parameters.

Slow: each test builds a model of vLLM's three times. A type whose own bfloat16 checkpoint vLLM does not load is skipped: the tiny
configuration lacks keys that published ones have, or the class needs what this processor lacks.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
pytest.importorskip("vllm")

from vllm.model_executor.models.registry import ModelRegistry

from tests.clients.dequantize import write_twin
from tests.clients.published import rewrite, tiny
from tests.clients.test_vllm_loading import convert
from tests.clients.vllm_loading import load, prepare_vllm, unfilled, weights
from tests.sweep.test_sweep import MAMBA_1
from tests.sweep.tiny import types

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
KNOWN = set(ModelRegistry.get_supported_archs())
KINDS = [kind for kind, names in types().items() if kind not in MAMBA_1 and not KNOWN.isdisjoint(names)]
# vLLM turns the plain matrices of these, which are stored as [in, out]; in NVFP4 they are as it builds them.
CONV1D = {"gpt2": r".*\.(c_attn|c_proj|c_fc)\.weight", "gpt-sw3": r".*\.(c_attn|c_proj|c_fc)\.weight"}


@pytest.fixture(autouse=True)
def vllm_on_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_vllm(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_loads_wherever_its_source_does(kind: str, tmp_path: Path) -> None:
    try:
        source = tiny(kind, tmp_path / "source")
        plain = load(source)
    except Exception as error:  # whatever transformers or vLLM raise for sizes and keys that they do not expect
        pytest.skip(f"not loaded without quantization: {type(error).__name__}: {error}")
    out = convert(source)
    parameters = load(out)
    assert any(name.endswith("weight_packed") for name in parameters)
    assert set(unfilled(parameters)) <= set(unfilled(plain))
    twin = write_twin(out, source, tmp_path / "twin", stacked=False)
    if kind in CONV1D:
        rewrite(
            twin, lambda name, values: (name, values.T.contiguous() if re.fullmatch(CONV1D[kind], name) else values)
        )
    found, expected = weights(parameters), load(twin)
    assert found.keys() == expected.keys() == plain.keys()
    assert [name for name in expected if not equal(found[name], expected[name])] == []


def equal(found, expected) -> bool:
    return found.shape == expected.shape and bool((found == expected).all())
