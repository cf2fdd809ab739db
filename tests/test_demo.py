"""The demo's checkpoint is one that engines and transformers load: sizes in its config, a tokenizer, no finding."""

from __future__ import annotations

from pathlib import Path

import pytest

import mfptq
from mfptq.demo import DemoShape, write_demo

SHAPES = {"dense": DemoShape(), "experts": DemoShape(experts=4, intermediate=128)}


@pytest.mark.parametrize("name", SHAPES)
def test_the_judge_finds_nothing_in_the_source_or_its_conversion(name: str, tmp_path: Path) -> None:
    write_demo(tmp_path / "source", SHAPES[name])
    mfptq.convert(tmp_path / "source", tmp_path / "out")
    assert mfptq.check(tmp_path / "out").findings == ()
    assert [each.code for each in mfptq.check(tmp_path / "source").findings] == ["not-quantized"]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_every_tensor_and_reads_text(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_demo(tmp_path / "source", SHAPES[name])
    model, told = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "source", output_loading_info=True
    )
    assert not told["missing_keys"] | told["unexpected_keys"] | told["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "source")
    text = "Bytes of any kind: wörld, 你好, \t\n"
    tokens = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(tokens["input_ids"][0]) == text
    assert model(input_ids=tokens["input_ids"]).logits.isfinite().all()
