"""Which files of a dataset on the Hub are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from mfptq.errors import UsageError
from mfptq.observation.hub_datasets import HubDataset, named_dataset, split_files

CHATS = [
    ".gitattributes", "README.md", "data/test_gen-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet",
    "data/train_gen-00000-of-00001.parquet", "data/train_sft-00000-of-00002-aa.parquet", "data/train_sft-00001-of-00002-bb.parquet",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("someone/chats:train_sft", HubDataset("someone/chats", None, "train_sft")),
        ("someone/chats", HubDataset("someone/chats")),
        ("someone/chats@v1.0:test", HubDataset("someone/chats", "v1.0", "test")),
        ("data/chats.jsonl", None),
        ("data/chats.parquet", None),
        ("chats.jsonl", None),
        ("/data/chats", None),
        ("../chats/x", None),
        ("a/b/c", None),
    ],
)
def test_names_are_told_from_paths(text: str, expected: HubDataset | None) -> None:
    assert named_dataset(text) == expected
    assert named_dataset(Path(text)) == expected


def test_what_exists_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_dataset("some/text") is not None
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "text").write_text("text")
    assert named_dataset("some/text") is None


def test_files_are_found_by_what_they_are_called() -> None:
    assert split_files(HubDataset("a/b", None, "train_sft"), CHATS, {}) == CHATS[-2:]
    assert split_files(HubDataset("a/b"), ["train.jsonl", "test.jsonl", "README.md"], {}) == ["train.jsonl"]
    assert split_files(HubDataset("a/b"), ["corpus.txt", "README.md"], {}) == ["corpus.txt"]
    assert split_files(HubDataset("a/b", None, "test"), ["contest.jsonl", "en/test/0.parquet"], {}) == [
        "en/test/0.parquet"
    ]


def test_the_card_tells_better() -> None:
    files = ["a/0.parquet", "a/1.parquet", "b/0.parquet", "train.parquet"]
    other = {"config_name": "other", "data_files": [{"split": "train", "path": "b/*"}]}
    default = {"config_name": "default", "data_files": [{"split": "train", "path": ["a/*"]}]}
    assert split_files(HubDataset("a/b"), files, {"configs": [other, default]}) == files[:2]
    assert split_files(HubDataset("a/b"), files, {"configs": [other]}) == files[2:3]
    assert split_files(HubDataset("a/b"), files, {"configs": "strange"}) == files[3:]
    assert split_files(HubDataset("a/b"), files, {"configs": [{"data_files": "a/*"}]}) == files[3:]


def test_an_unknown_split_is_refused_with_what_there_is() -> None:
    with pytest.raises(
        UsageError, match=r"no split 'valid': its text is in 'data/test_gen.*name one as OWNER/NAME:SPLIT"
    ):
        split_files(HubDataset("a/b", None, "valid"), CHATS, {})
    with pytest.raises(UsageError, match="holds no file of"):
        split_files(HubDataset("a/b"), ["README.md", "x.arrow"], {})
