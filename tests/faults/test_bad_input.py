"""Bad input: one line on stderr, its exit code, nothing created, the source untouched."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mfptq.checkpoint.folder import INDEX, Origin, read_checkpoint
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


CASES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "21_truncated": (truncate, 3, "truncated"),
    "34_parent_path": (lambda s: rename_shard(s, "../x.safetensors"), 3, "plain name"),
    "35_absolute_path": (lambda s: rename_shard(s, "/etc/passwd"), 3, "plain name"),
    "36_windows_path": (lambda s: rename_shard(s, "..\\x.safetensors"), 3, "plain name"),
    "37_url": (lambda s: rename_shard(s, "x?y#.safetensors"), 3, "plain name"),
    "40_fifo": (fifo, 3, "not a regular file"),
    "41_missing_shard": (lambda s: (s / SHARD).unlink(), 3, "missing"),
    "42_missing_tensor": (lambda s: edit_index(s, lambda i: i["weight_map"].update(ghost=SHARD)), 3, "'ghost'"),
    "43_not_in_index": (lambda s: edit_index(s, lambda i: i["weight_map"].popitem()), 3, "missing from"),
    "45_weight_map": (lambda s: (s / INDEX).write_text('{"weight_map": []}'), 3, "weight_map"),
    "46_two_indexes": (lambda s: (s / "other.safetensors.index.json").write_text("{}"), 3, "one index"),
    "47_only_pickles": (only_pickles, 3, "pickle"),
    "50_hostile_link": (outside_link, 3, "leads out"),
    "52_no_config": (lambda s: (s / "config.json").unlink(), 3, "config.json"),
    "52_config_list": (lambda s: (s / "config.json").write_text("[]"), 3, "not a JSON object"),
    "52_config_twice": (lambda s: (s / "config.json").write_text('{"a":1,"a":2}'), 3, "twice"),
    "52_quantized": (
        lambda s: edit_config(s, quantization_config={"quant_method": "fp8"}),
        3,
        "already quantized as 'fp8'",
    ),
    "57_nan": (lambda s: poison(s, np.nan), 3, "flat index 77"),
    "57_inf": (lambda s: poison(s, -np.inf), 3, "-inf"),
}


@pytest.mark.parametrize("name", CASES)
def test_case_source(name: str, source: Path, tmp_path: Path) -> None:
    change, code, message = CASES[name]
    change(source)
    before = digests(source) if name != "40_fifo" else {}
    done = command("convert", source, tmp_path / "out")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("mfptq: error: ")
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "pwned").exists()
    if before:
        assert digests(source) == before


OPTIONS = {
    "67_bad_regex": (["--ignore", "re:a("], 2, "position"),
    "69_no_match": (["--ignore", "lm_heat"], 2, "'lm_head'"),
    "66_split": (["--ignore", "model.language_model.layers.3.self_attn.k_proj"], 2, "splits fused group"),
    "70_nothing_left": (["--ignore", "re:.*"], 2, "nothing is left"),
    "method": (["--method", "best"], 2, "expected one of"),
    "scheme": (["--scheme", "NVFP4"], 2, "needs input scales"),
    "memory_text": (["--max-memory", "lots"], 2, "500MB"),
    "115_memory_small": (["--max-memory", "10MB"], 8, "least that works"),
    "workers": (["--max-workers", "0"], 2, "at least 1"),
    "device": (["--device", "abacus"], 2, "unknown"),
    "78_scales_missing": (["--input-scales", "nowhere.json"], 4, "nowhere.json"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_case_option(name: str, source: Path, tmp_path: Path) -> None:
    options, code, message = OPTIONS[name]
    done = command("convert", source, tmp_path / "out", *options)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "amax", "values": {}}', "[1]", '{"kind":"x","values":{"a":1}}'])
def test_case_empty_scales(text: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "scales.json").write_text(text)
    done = command("convert", source, tmp_path / "out", "--input-scales", tmp_path / "scales.json")
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_case_54_targeted_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "k24").mkdir()
    save_file({"a.weight": np.ones((8, 24), np.float32)}, tmp_path / "k24" / "model.safetensors")
    (tmp_path / "k24" / "config.json").write_text("{}")
    done = command("convert", tmp_path / "k24", tmp_path / "out", "--target", "a")
    assert done.returncode == 3
    assert "24 columns are not a multiple of 16" in done.stderr


def test_case_79_foreign_files_are_untouched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for options in ([], ["--overwrite"]):
        done = command("convert", source, tmp_path / "out", *options)
        assert done.returncode == 5
        assert digests(tmp_path / "out").keys() == {"mine.txt"}


@pytest.mark.parametrize("place", ["source", "source/inner", ".", "link"])
def test_case_80_output_and_source_are_apart(place: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    before = digests(source)
    done = command("convert", source, tmp_path / place)
    assert done.returncode == 5, done.stderr
    assert digests(source) == before


def test_case_81_parent_missing_or_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("nowhere/out", "file", "file/out"):
        done = command("convert", source, tmp_path / place)
        assert done.returncode == 5, done.stderr
        assert done.stderr.count("\n") == 1


def test_case_51_code_of_the_source_is_copied_never_run(source: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (source / "modeling_x.py").write_text(code)
    assert command("convert", source, tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "modeling_x.py").read_text() == code
    assert not (tmp_path / "ran").exists()


def test_case_94_closed_stdout(source: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    line = (
        f"{sys.executable} -c 'from mfptq.cli.main import run; run()' convert {source} {tmp_path / 'out'} > /dev/full"
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 5, done.stderr
    assert command("verify", tmp_path / "out", "--source", source).returncode == 0
