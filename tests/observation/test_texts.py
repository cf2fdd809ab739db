"""Datasets in all their forms become the same token ids, from a tokenizer or from a processor that nests them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mfptq.errors import UsageError
from mfptq.observation import texts
from mfptq.observation.texts import flat_ids, read_samples
from tests.models import write_companions

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ("The quick brown fox", "", "jumps over", "the lazy dog.")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_companions(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(tokenizer: Any) -> Any:
    """The processor of Qwen3-VL and Qwen3.5, with stand-ins for the parts that look at pictures."""
    from transformers import Qwen3VLProcessor
    from transformers.image_processing_utils import BaseImageProcessor

    class Pictures(BaseImageProcessor):
        merge_size = 2
        model_input_names = ()

    class Blind(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
            return type(argument)

    return Blind(Pictures(), tokenizer, Pictures(), chat_template=tokenizer.chat_template)


@pytest.fixture(params=["tokenizer", "processor"])
def encoder(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, encoder: Any, samples: int = 100, length: int = 4096) -> list[list[int]]:
    return [ids.tolist() for ids in read_samples(path, encoder, samples=samples, max_seq_length=length).ids]


def test_the_processor_nests_its_ids(tokenizer: Any, processor: Any) -> None:
    assert processor(text="ab")["input_ids"] == [tokenizer(text="ab")["input_ids"]]  # or the tests below prove little


def test_rows_of_every_kind(encoder: Any, tokenizer: Any, tmp_path: Path) -> None:
    expected = [tokenizer(text=text)["input_ids"] for text in TEXTS if text]
    rows: dict[str, list[Any]] = {
        "text": [{"text": text, "other": 1} for text in TEXTS],
        "strings": list(TEXTS),
        "messages": [{"messages": [{"role": "user", "content": text}]} for text in TEXTS if text],
        "input_ids": [{"input_ids": ids} for ids in expected],
        "nested": [{"input_ids": [ids]} for ids in expected],
        "bare": expected,
    }
    digests = set()
    for name, values in rows.items():
        path = write_rows(tmp_path / f"{name}.jsonl", values)
        assert read(path, encoder) == expected, name
        digests.add(read_samples(path, encoder, samples=3, max_seq_length=4096).digest)
    assert len(digests) == 1


def test_conversations_in_parts(encoder: Any, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "hello"}]
    encoder_template = encoder.chat_template
    encoder.chat_template = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    try:
        path = write_rows(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": parts}]}])
        assert read(path, encoder) == [flat_ids(encoder(text="hello")["input_ids"])]
    finally:
        encoder.chat_template = encoder_template


def test_samples_and_lengths_are_limited(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [[1, 2, 3, 4], [5], [6, 7]])
    assert read(path, tokenizer, samples=2, length=3) == [[1, 2, 3], [5]]
    first = read_samples(path, tokenizer, samples=3, max_seq_length=3)
    assert first.digest != read_samples(path, tokenizer, samples=3, max_seq_length=4).digest
    assert first.highest == 7


def test_rows_after_the_last_sample_are_not_read(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[1, 2]\nnot JSON\n")
    assert read(path, tokenizer, samples=1) == [[1, 2]]


def test_plain_text_is_cut_into_sequences(encoder: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(texts, "TEXT_CHUNK", 16)
    text = "".join(f"line {number} of many\n" for number in range(30))
    (tmp_path / "book.txt").write_text(text)
    found = read(tmp_path / "book.txt", encoder, length=50)
    assert [number for ids in found for number in ids] == tokenizer(text=text)["input_ids"]
    assert {len(ids) for ids in found[:-1]} == {50}


def test_every_sequence_of_plain_text_begins_as_texts_do(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    class Beginning:
        bos_token_id, cls_token_id = 300, None

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [300] * add_special_tokens + list(text.encode())}

    (tmp_path / "book.txt").write_text("abcdefg")
    assert read(tmp_path / "book.txt", Beginning(), length=4) == [[300, 97, 98, 99], [300, 100, 101, 102], [300, 103]]


def test_parquet(encoder: Any, tokenizer: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": list(TEXTS), "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", encoder) == [tokenizer(text=text)["input_ids"] for text in TEXTS if text]
    parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="has no column input_ids, messages, text"):
        read(tmp_path / "b.parquet", encoder)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(UsageError, match=r"c\.parquet"):
        read(tmp_path / "c.parquet", encoder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x"}', "row 1: expected one of input_ids, messages, text, got 'content'"),
        ('{"text": 3}', "row 1: its text is 'int'"),
        ('{"text": ', "line 1: not JSON"),
        ("[1, -2]", "row 1: its token ids"),
        ("[[1], [2]]", "row 1: its token ids"),
        ("[1.5]", "row 1: its token ids"),
        ('{"messages": "hello"}', "row 1: its messages"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}', "images"),
        ("3", "row 1: its token ids"),
        ('{"text": ""}', "holds no text"),
        ("", "holds no text"),
    ],
)
def test_bad_rows_are_one_line(line: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(UsageError) as caught:
        read(path, tokenizer)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read it: No such file"):
        read(tmp_path / "none.jsonl", tokenizer)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        read(tmp_path / "bytes.txt", tokenizer)


def test_messages_need_a_template(tmp_path: Path) -> None:
    class Plain:
        chat_template = None

    path = write_rows(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(UsageError, match="chat template"):
        read(path, Plain())


@pytest.mark.parametrize("ids", [[1, 2], [[1, 2]], [[[1, 2]]], np.array([1, 2]), torch.tensor([[1, 2]]), (1, 2)])
def test_flat_ids(ids: Any) -> None:
    assert flat_ids(ids) == [1, 2]
