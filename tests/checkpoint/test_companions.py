"""Every file of a source is a shard, a companion, written anew, or named as left out; for folders and repos by one rule."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

import mfptq
from mfptq.checkpoint.companions import INDEX, FileChoice
from mfptq.checkpoint.folder import Origin, read_checkpoint
from mfptq.errors import IndexMismatchError, SourceError, UnsafePathError, UsageError
from tests.conftest import digests

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def shard_bytes(tensors: dict[str, list[int]]) -> bytes:
    return save({name: np.zeros(shape, np.float32) for name, shape in tensors.items()})


def read(folder: Path, **choice: tuple[str, ...]):
    checkpoint = read_checkpoint(Origin(folder), choice=FileChoice(**choice))
    checkpoint.source.close()
    return checkpoint


def put(path: Path, content: str | bytes = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rename_shards(source: Path, total: int = 3) -> None:
    """Take the index away: the shards' numbers alone say that they belong together."""
    (source / INDEX).unlink()
    assert len(list(source.glob("model-0000*-of-00003.safetensors"))) == total


def test_small_files_are_copied_whatever_they_are_called(source: Path, tmp_path: Path) -> None:
    names = [
        "tokenizer.model.v3", "vocab.bpe", "1_Pooling/config.json", "additional_chat_templates/tool_use.jinja",
        "modules.json", "2_Dense/model.safetensors", "2_Dense/config.json", "assets/deep/er/picture.png",
    ]  # fmt: skip
    for name in names:
        put(source / name, shard_bytes({"linear.weight": [2, 2]}) if name.endswith(".safetensors") else "{}")
    put(source / "modules.json", json.dumps([{"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": ""}]))
    mfptq.convert(source, tmp_path / "out")
    made, given = digests(tmp_path / "out"), digests(source)
    assert {name: made.get(name) for name in names} == {name: given[name] for name in names}
    assert mfptq.verify(tmp_path / "out", source).ok
    mfptq.convert(source, tmp_path / "out", overwrite=True)
    assert digests(tmp_path / "out") == made


def test_what_is_left_out_is_named_with_its_size(source: Path, tmp_path: Path) -> None:
    left = {
        "pytorch_model.bin": 3, "model.gguf": 5, "original/params.json": 2, "original/consolidated.00.pth": 7,
        "onnx/model.onnx": 4, "onnx/config.json": 2, "text_encoder/model.safetensors": 8, "text_encoder/config.json": 2,
        "hf_quant_config.json": 2,
    }  # fmt: skip
    for name, size in left.items():
        put(source / name, "x" * size)
    with (source / "huge.txt").open("wb") as file:
        file.truncate(100_000_001)
    found = read(source)
    assert dict(found.left_out) == {**left, "huge.txt": 100_000_001}
    mfptq.convert(source, tmp_path / "out")
    assert not set(digests(tmp_path / "out")) & {*left, "huge.txt"}


def test_a_file_that_no_index_names_and_that_holds_tensors_of_its_own(source: Path, tmp_path: Path) -> None:
    put(source / "mtp.safetensors", shard_bytes({"mtp.extra.norm.weight": [4]}))
    with pytest.raises(IndexMismatchError, match=r"mtp\.safetensors.*1 tensors that no shard has.*include the file or"):
        read(source)
    assert "mtp.safetensors" in read(source, skip=("mtp.safetensors",)).left_out
    included = read(source, include=("mtp.safetensors",))
    assert "mtp.extra.norm.weight" in {tensor.info.name for tensor in included.tensors()}
    assert "mtp.safetensors" not in included.left_out
    mfptq.convert(source, tmp_path / "with", include_files=["mtp.safetensors"])
    mfptq.convert(source, tmp_path / "without", skip_files=["mtp.safetensors"])
    assert "mtp.safetensors" in digests(tmp_path / "with")
    assert "mtp.safetensors" not in digests(tmp_path / "without")
    assert mfptq.verify(tmp_path / "with", source).ok
    found = mfptq.verify(tmp_path / "without", source)
    assert found.ok
    assert "mtp.safetensors" in found.left_out
    for choice in ({"skip": ("none.safetensors",)}, {"include": ("config.json",)}):
        with pytest.raises(UsageError, match="no such safetensors file"):
            read(source, **choice)
    with pytest.raises(UsageError, match="both included and skipped"):
        read(source, include=("mtp.safetensors",), skip=("mtp.safetensors",))


def test_a_file_that_no_index_names_and_that_holds_nothing_new(source: Path) -> None:
    shutil.copy(source / "model-00001-of-00003.safetensors", source / "copy.safetensors")
    assert "copy.safetensors" in read(source).left_out


def test_two_indexes_the_usual_one_counts(source: Path) -> None:
    put(source / "consolidated-00001-of-00001.safetensors", shard_bytes({"layers.0.wq.weight": [4]}))
    put(source / "consolidated.safetensors.index.json", "{}")
    put(source / "other-00001.safetensors", shard_bytes({"layers.0.wq.weight": [4]}))
    put(source / "other.safetensors.index.json", "{}")
    found = read(source)
    assert len(found.shards) == 3
    assert {
        "consolidated-00001-of-00001.safetensors",
        "other-00001.safetensors",
        "other.safetensors.index.json",
    } <= set(found.left_out)
    (source / INDEX).unlink()
    with pytest.raises(IndexMismatchError, match=r"expected an index named .*other\.safetensors"):
        read(source)


def test_numbered_shards_without_an_index(source: Path, tmp_path: Path) -> None:
    rename_shards(source)
    mfptq.convert(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert mfptq.verify(tmp_path / "out", source).ok
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SourceError, match="shard 2 of 3 is missing"):
        read(source)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json", "tokenizer.model"])
def test_a_git_lfs_pointer_is_said_to_be_one(name: str, source: Path, tmp_path: Path) -> None:
    put(source / name, POINTER)
    with pytest.raises(SourceError, match=rf"'{name}' is a git-lfs pointer.*git lfs pull"):
        mfptq.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_a_surrogate_pair_in_the_config_stays_what_it_was(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    put(source / "config.json", json.dumps({**config, "_name_or_path": "/models/\ud83d"}))
    mfptq.convert(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_name_or_path"] == "/models/\ud83d"


def test_a_file_name_that_is_no_text_is_refused(source: Path, tmp_path: Path) -> None:
    os.close(os.open(os.fsencode(source) + b"/note-\xff.txt", os.O_CREAT | os.O_WRONLY))
    with pytest.raises(UnsafePathError, match="not valid Unicode"):
        mfptq.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_that_leads_nowhere_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    (source / "note.txt").symlink_to(source / "nothing.txt")
    with pytest.raises(SourceError, match="missing"):
        mfptq.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_links_is_read_where_that_is_asked_for(source: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for path in source.iterdir():
        (links / path.name).symlink_to(path)
    with pytest.raises(UnsafePathError, match="follow_links"):
        mfptq.convert(links, tmp_path / "out")
    mfptq.convert(links, tmp_path / "out", follow_links=True)
    mfptq.convert(source, tmp_path / "whole")
    assert (tmp_path / "out" / "SHA256SUMS").read_text() == (tmp_path / "whole" / "SHA256SUMS").read_text()
    assert mfptq.verify(tmp_path / "out", links, follow_links=True).ok
    with pytest.raises(UnsafePathError, match="follow_links"):
        mfptq.verify(tmp_path / "out", links)
    assert mfptq.inspect(links, follow_links=True).tensors == mfptq.inspect(source).tensors


def test_an_output_does_not_follow_a_link_of_its_sub_folder(source: Path, tmp_path: Path) -> None:
    put(source / "1_Pooling/config.json", "{}")
    (tmp_path / "elsewhere").mkdir()
    mfptq.convert(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "1_Pooling")
    (tmp_path / "out" / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError, match="leads out of"):
        mfptq.convert(source, tmp_path / "out", overwrite=True)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model-Q4_K_M.gguf"], r"no config.json; GGUF files \('model-Q4_K_M.gguf'\) are not read"),
        (["config.json", "model-Q4_K_M.gguf"], r"no safetensors file here: .*GGUF files"),
        (["config.json", "pytorch_model.bin"], r"no safetensors file here: .*pickle checkpoints \('pytorch_model.bin'\) are not read"),
        (["params.json", "consolidated.safetensors"], r"no config.json; params.json is of a vendor's own format"),
    ],
    ids=["GGUF", "GGUF with a config", "pickles", "Mistral's own"],
)  # fmt: skip
def test_weights_of_another_kind_are_named(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        put(tmp_path / name, "{}" if name.endswith(".json") else b"GGUF")
    with pytest.raises(SourceError, match=message):
        read(tmp_path)
