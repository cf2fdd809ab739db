"""Evaluations of smoothed outputs: what was scaled counts, kept tensors too."""

from __future__ import annotations

import json

import pytest

import mfptq
from mfptq.errors import SourceError
from mfptq.observation import evaluation_pass
from mfptq.observation.evaluate import evaluate

from ..calibration.files import calibrate
from ..conftest import sampled
from ..models import write_companions
from .models import fold, write_model

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = {"scheme": "W4A16", "method": "search"}


@pytest.mark.parametrize(
    ("kind", "streamed"), sampled([("llama", False), ("qwen3_moe", True)], [("llama", True), ("qwen3_moe", False)])
)
def test_figures_are_those_of_the_folded_model(kind, streamed, tmp_path, monkeypatch):
    """Norms that only multiply: the folded model computes the same to the bit, and so does its plain conversion."""
    source = write_model(tmp_path / "source", kind)
    path = calibrate(source, tmp_path / "x.calibration.safetensors")
    folded = fold(source, tmp_path / "folded", calibration=path)
    for folder in (source, folded):
        write_companions(folder)
    mfptq.convert(source, tmp_path / "smoothed", calibration=path, smooth=True, **WEIGHTS)
    mfptq.convert(folded, tmp_path / "plain", **WEIGHTS)
    text = tmp_path / "ids.jsonl"
    text.write_text("".join(json.dumps([(7 * i * n) % 150 for i in range(30)]) + "\n" for n in (1, 2, 3)))
    monkeypatch.setattr(evaluation_pass, "is_streamed", lambda *_: streamed)
    found = evaluate(tmp_path / "smoothed", source, text, max_seq_length=32)
    expected = evaluate(tmp_path / "plain", folded, text, max_seq_length=32)
    assert found.kl_divergence == expected.kl_divergence
    assert found.perplexity == expected.perplexity
    assert 0 < found.kl_divergence.value < 1
    (tmp_path / "smoothed" / "mfptq_smoothing.json").unlink()
    assert evaluate(tmp_path / "smoothed", source, text, max_seq_length=32).kl_divergence != found.kl_divergence
    (tmp_path / "smoothed" / "mfptq_smoothing.json").write_text('{"format": 1}')
    with pytest.raises(SourceError, match="is damaged"):
        evaluate(tmp_path / "smoothed", source, text)
