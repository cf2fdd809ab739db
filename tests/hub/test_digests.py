"""Files that are read whole and in order are compared with the Hub's digests; the others are counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import mfptq
from tests.conftest import Stopped, stopping_at
from tests.hub.conftest import Run
from tests.hub.server import REPO, Content, LoopbackHub

LARGE = 5 * 2**20  # more than is read at once


def add_tokenizer(hub: LoopbackHub, sent: bytes, name: str = "tokenizer.model") -> None:
    """Add a commit with a large file whose listing is that of zeros, and whose bytes are `sent`."""
    content = dataclasses.replace(Content.of(bytes(LARGE)), data=sent)
    repo = hub.repos[REPO]
    hub.stored[content.sha256] = content
    repo.commit({**repo.commits[-1][1], name: content})


def test_a_large_companion_is_compared_with_its_sha256(client: LoopbackHub, tmp_path: Path) -> None:
    add_tokenizer(client, bytes(LARGE - 1) + b"x")
    with pytest.raises(mfptq.SourceChangedError, match=r"'tokenizer.model' is not what its digest on the Hub says"):
        mfptq.convert(REPO, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_shards_are_compared_with_their_sha256(client: LoopbackHub, run: Run, source: Path, tmp_path: Path) -> None:
    add_tokenizer(client, bytes(LARGE))
    report = mfptq.convert(REPO, tmp_path / "out")
    assert report.unchecked_files == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == bytes(LARGE)
    done = run("convert", REPO, tmp_path / "other")
    assert "unchecked" not in done.stdout


@pytest.mark.parametrize("place", [0.5, 0.999])
def test_a_shard_with_another_content_of_the_same_length_is_found(
    place: float, client: LoopbackHub, source: Path, tmp_path: Path
) -> None:
    path = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = client.repos[REPO].commits[-1][1][path.name]
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    client.repos[REPO].commits[-1][1][path.name] = dataclasses.replace(content, data=bytes(data), path=None)
    with pytest.raises(mfptq.SourceChangedError, match=f"'{path.name}' is not what its digest on the Hub says"):
        mfptq.convert(REPO, tmp_path / "out")
    assert not (tmp_path / "out" / path.name).exists()
    assert not (tmp_path / "out" / "config.json").exists()


def test_shards_that_are_not_compared_are_counted(client: LoopbackHub, run: Run, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, "model-00001-of-00003.safetensors")
    done = run("convert", REPO, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 shard was not read whole and in order: lengths and ETags were checked" in done.stdout


def test_another_commit_is_another_source(client: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        mfptq.convert(REPO, tmp_path / "out", on_event=stopping_at(mfptq.ShardFinished))
    repo = client.repos[REPO]
    repo.commit({**repo.commits[-1][1], "new.txt": Content.of(b"new")})
    with pytest.raises(mfptq.PlanMismatchError, match="with other commit"):
        mfptq.convert(REPO, tmp_path / "out")
    mfptq.convert(REPO, tmp_path / "out", revision=repo.commits[0][0])
