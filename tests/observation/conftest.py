"""What several tests of evaluations share: text, a converted model and its figures, each made once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mfptq
from mfptq.observation.evaluate import evaluate
from tests.models import DENSE
from tests.observation.cases import OPTIONS, ROWS, Case


@pytest.fixture(scope="package")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    path.write_text("".join(json.dumps(generator.integers(0, 256, n).tolist()) + "\n" for n in ROWS))
    return path


@pytest.fixture(scope="package")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("dense"), DENSE)


@pytest.fixture(scope="package")
def events() -> list[mfptq.EvaluationProgress]:
    """What the evaluation below told on its way."""
    return []


@pytest.fixture(scope="package")
def evaluated(dense: Case, dataset: Path, events: list[mfptq.EvaluationProgress]) -> mfptq.Evaluation:
    """The figures of `dense`, in float32."""
    return evaluate(dense.output, dense.source, dataset, on_event=events.append, **OPTIONS)
