"""Bad input: one line on stderr, its exit code, nothing created, the source untouched."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mfptq.checkpoint.companions import INDEX
from mfptq.checkpoint.folder import Origin, read_checkpoint
from tests.conftest import command, digests

SHARD = "model-00002-of-00003.safetensors"


def edit_index(source: Path, change: Callable[[dict], None]) -> None:
    index = json.loads((source / INDEX).read_text())
    change(index)
    (source / INDEX).write_text(json.dumps(index))


def edit_config(source: Path, **values: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **values}))


def poison(source: Path, value: float) -> None:
    tensor = next(t for t in read_checkpoint(Origin(source)).tensors() if t.info.name.endswith("mlp.down_proj.weight"))
    with (source / tensor.shard).open("r+b") as file:
        file.seek(tensor.offset + 2 * 77)
        file.write((np.array([value], np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())


def rename_shard(source: Path, name: str) -> None:
    edit_index(source, lambda index: index["weight_map"].update(dict.fromkeys(list(index["weight_map"])[:1], name)))


def only_pickles(source: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def truncate(source: Path) -> None:
    os.truncate(source / SHARD, (source / SHARD).stat().st_size - 1)


def fifo(source: Path) -> None:
    (source / SHARD).unlink()
    os.mkfifo(source / SHARD)


def outside_link(source: Path) -> None:
    (source.parent / "secret").write_text("secret")
    (source / "notes.txt").symlink_to(source.parent / "secret")


SOURCES: dict[str, tuple[int, Callable[[Path], object], int, str]] = {
    "truncated": (21, truncate, 3, "truncated"),
    "parent_path": (34, lambda s: rename_shard(s, "../x.safetensors"), 3, "plain name"),
    "absolute_path": (35, lambda s: rename_shard(s, "/etc/passwd"), 3, "plain name"),
    "windows_path": (36, lambda s: rename_shard(s, "..\\x.safetensors"), 3, "plain name"),
    "url": (37, lambda s: rename_shard(s, "x?y#.safetensors"), 3, "plain name"),
    "fifo": (40, fifo, 3, "not a regular file"),
    "missing_shard": (41, lambda s: (s / SHARD).unlink(), 3, "missing"),
    "missing_tensor": (42, lambda s: edit_index(s, lambda i: i["weight_map"].update(ghost=SHARD)), 3, "'ghost'"),
    "not_in_index": (43, lambda s: edit_index(s, lambda i: i["weight_map"].popitem()), 3, "missing from"),
    "weight_map": (45, lambda s: (s / INDEX).write_text('{"weight_map": []}'), 3, "weight_map"),
    "another_index": (
        46,
        lambda s: (s / INDEX).rename(s / "other.safetensors.index.json"),
        3,
        "expected an index named",
    ),
    "only_pickles": (47, only_pickles, 3, "pickle"),
    "hostile_link": (50, outside_link, 3, "leads out"),
    "no_config": (52, lambda s: (s / "config.json").unlink(), 3, "config.json"),
    "config_list": (52, lambda s: (s / "config.json").write_text("[]"), 3, "not a JSON object"),
    "config_twice": (52, lambda s: (s / "config.json").write_text('{"a":1,"a":2}'), 3, "twice"),
    "nan": (57, lambda s: poison(s, np.nan), 3, "flat index 77"),
    "inf": (57, lambda s: poison(s, -np.inf), 3, "-inf"),
}


def marked(table: dict[str, tuple]) -> list:
    """Return the names of a table as parameters, each marked with the case that its row begins with."""
    return [pytest.param(name, marks=[pytest.mark.case(row[0])] if row[0] else []) for name, row in table.items()]


@pytest.mark.parametrize("name", marked(SOURCES))
def test_a_bad_source_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    _, change, code, message = SOURCES[name]
    change(source)
    before = digests(source) if name != "fifo" else {}
    done = command(
        "convert", source, tmp_path / "out", "-q"
    )  # no line for a shard that was finished before the fault was met
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("mfptq: error: ")
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "pwned").exists()
    if before:
        assert digests(source) == before


OPTIONS: dict[str, tuple[int | None, list[str], int, str]] = {
    "bad_regex": (67, ["--ignore", "re:a("], 2, "position"),
    "no_match": (69, ["--ignore", "lm_heat"], 2, "'lm_head'"),
    "split": (66, ["--ignore", "model.language_model.layers.3.self_attn.k_proj"], 2, "splits fused group"),
    "nothing_left": (70, ["--ignore", "re:.*"], 2, "nothing is left"),
    "method": (None, ["--method", "best"], 2, "expected one of"),
    "scheme": (None, ["--scheme", "NVFP4"], 2, "needs input scales"),
    "memory_text": (None, ["--max-memory", "lots"], 2, "500MB"),
    "memory_small": (115, ["--max-memory", "10MB"], 8, "least that works"),
    "workers": (None, ["--max-workers", "0"], 2, "at least 1"),
    "device": (None, ["--device", "abacus"], 2, "unknown"),
    "scales_missing": (None, ["--input-scales", "nowhere.json"], 4, "nowhere.json"),
}


@pytest.mark.parametrize("name", marked(OPTIONS))
def test_a_bad_option_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    _, options, code, message = OPTIONS[name]
    done = command("convert", source, tmp_path / "out", *options)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "amax", "values": {}}', "[1]", '{"kind":"x","values":{"a":1}}'])
def test_scales_that_hold_none_are_refused(text: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "scales.json").write_text(text)
    done = command("convert", source, tmp_path / "out", "--input-scales", tmp_path / "scales.json")
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.case(54)
def test_targeted_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "k24").mkdir()
    save_file({"a.weight": np.ones((8, 24), np.float32)}, tmp_path / "k24" / "model.safetensors")
    (tmp_path / "k24" / "config.json").write_text("{}")
    done = command("convert", tmp_path / "k24", tmp_path / "out", "--target", "a")
    assert done.returncode == 3
    assert "24 columns are not a multiple of 16" in done.stderr


@pytest.mark.case(79)
def test_foreign_files_are_untouched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for options in ([], ["--overwrite"]):
        done = command("convert", source, tmp_path / "out", *options)
        assert done.returncode == 5
        assert digests(tmp_path / "out").keys() == {"mine.txt"}


@pytest.mark.parametrize("place", ["source", "source/inner", ".", "link"])
@pytest.mark.case(80)
def test_output_and_source_are_apart(place: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    before = digests(source)
    done = command("convert", source, tmp_path / place)
    assert done.returncode == 5, done.stderr
    assert digests(source) == before


@pytest.mark.case(81)
def test_parent_missing_or_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert command("convert", source, tmp_path / "nowhere" / "deep" / "out").returncode == 0
    for place in ("file", "file/out"):
        done = command("convert", source, tmp_path / place)
        assert done.returncode == 5, done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.case(51)
def test_code_of_the_source_is_copied_never_run(source: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (source / "modeling_x.py").write_text(code)
    assert command("convert", source, tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "modeling_x.py").read_text() == code
    assert not (tmp_path / "ran").exists()
