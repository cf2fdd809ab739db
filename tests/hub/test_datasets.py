"""Text by the name of a dataset on the Hub, for calibration and evaluation."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from mfptq.errors import HubError, UsageError
from mfptq.observation.hub_datasets import dataset_files
from mfptq.observation.texts import read_samples
from tests.hub.server import LoopbackHub

IDS = [[number, number + 1, number + 2] for number in range(6)]
ENCODER = SimpleNamespace()  # rows of token ids need none


@pytest.fixture
def chats(client: LoopbackHub, tmp_path: Path) -> LoopbackHub:
    """Two files of a split, and one of another."""
    folder = tmp_path / "chats"
    (folder / "data").mkdir(parents=True)
    for name, rows in (("train-0-of-2", IDS[:3]), ("train-1-of-2", IDS[3:]), ("test-0-of-1", [[99, 98]])):
        text = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(text)
    client.add(folder, "datasets/someone/chats")
    return client


def fetched(hub: LoopbackHub) -> list[str]:
    return [each.path.rpartition("/")[2] for each in hub.asked if "/resolve/" in each.path and each.method == "GET"]


def test_files_are_fetched_as_far_as_text_is_read(chats: LoopbackHub) -> None:
    few = read_samples(dataset_files("someone/chats:train"), ENCODER, samples=2, max_seq_length=8)
    assert [ids.tolist() for ids in few.ids] == IDS[:2]
    assert set(fetched(chats)) == {"train-0-of-2.jsonl"}
    every = read_samples(dataset_files("someone/chats"), ENCODER, samples=9, max_seq_length=8)
    assert [ids.tolist() for ids in every.ids] == IDS
    chats.reset_counts()
    read_samples(dataset_files("someone/chats"), ENCODER, samples=9, max_seq_length=8)
    assert fetched(chats) == []  # they are in the cache


def test_the_card_and_the_revision_count(chats: LoopbackHub, tmp_path: Path) -> None:
    repo = chats.repos["datasets/someone/chats"]
    first = repo.commits[0][0]
    repo.card = {"configs": [{"data_files": [{"split": "train", "path": "data/test-*"}]}]}
    assert [path.name for path in dataset_files("someone/chats")] == ["test-0-of-1.jsonl"]
    repo.card = {}
    repo.commit({name: each for name, each in repo.commits[0][1].items() if "-1-of-2" not in name})
    assert [path.name for path in dataset_files("someone/chats")] == ["train-0-of-2.jsonl"]
    assert len(list(dataset_files(f"someone/chats@{first}:train"))) == 2


def test_what_is_wrong_is_one_line(chats: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="someone/nothing"):
        next(dataset_files("someone/nothing:train"))
    with pytest.raises(UsageError, match="no split 'valid'"):
        next(dataset_files("someone/chats:valid"))
    chats.repos["datasets/someone/chats"].gated = True
    with pytest.raises(HubError, match="gated"):
        next(dataset_files("someone/chats:train"))
    assert list(islice(dataset_files(tmp_path / "x.jsonl"), 2)) == [tmp_path / "x.jsonl"]
