"""No tokenizer is loaded for rows of token ids, and one at the first text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mfptq
from mfptq.errors import SourceError
from mfptq.observation import models
from mfptq.observation.models import DeferredEncoder
from tests.models import DENSE, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_model_without_a_tokenizer_takes_token_ids_but_no_text(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", DENSE, "apart")
    for path in source.glob("tokenizer*"):
        path.unlink()
    rows, text = tmp_path / "ids.jsonl", tmp_path / "text.jsonl"
    rows.write_text("[1, 2, 3]\n[4, 5]\n")
    text.write_text('{"text": "hello"}\n')
    assert mfptq.calibrate(source, rows, tmp_path / "a.calibration.safetensors").samples == 2
    with pytest.raises(SourceError, match="tokenizer"):
        mfptq.calibrate(source, text, tmp_path / "b.calibration.safetensors")


def test_it_is_loaded_once_and_does_as_the_tokenizer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []

    class Tokenizer(SimpleNamespace):
        def __call__(self, **given: Any) -> dict[str, Any]:
            return given

    def load(folder: Path) -> Tokenizer:
        loaded.append(folder)
        return Tokenizer(bos_token_id=2)

    monkeypatch.setattr(models, "load_encoder", load)
    encoder = DeferredEncoder(Path("model"))
    assert loaded == []
    assert encoder(text="a") == {"text": "a"}
    assert encoder.bos_token_id == 2
    assert not hasattr(encoder, "tokenizer")
    assert loaded == [Path("model")]
