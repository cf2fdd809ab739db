"""The same command on its own output: done at once, and never a finished output of something else taken for it."""

import os
import shutil
from pathlib import Path

import pytest

import mfptq
from mfptq.errors import DestinationExistsError
from tests.conftest import Stopped, command, digests, stopping_at


def test_a_rerun_of_a_finished_conversion_is_done_at_once(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "parents" / "out"
    assert command("convert", source, out).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = command("convert", source, out)
    assert again.returncode == 0, again.stderr
    assert "already complete" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    report = mfptq.convert(source, out)
    assert report.already_complete
    assert report.quantized
    assert report.patterns


def test_the_sources_times_and_place_do_not_matter(source: Path, tmp_path: Path) -> None:
    mfptq.convert(source, tmp_path / "out")
    for path in source.iterdir():
        os.utime(path, ns=(1, 1))
    assert mfptq.convert(source, tmp_path / "out").already_complete
    shutil.copytree(source, tmp_path / "elsewhere" / "copy")
    assert mfptq.convert(tmp_path / "elsewhere" / "copy", tmp_path / "out").already_complete
    mfptq.convert(tmp_path / "elsewhere" / "copy", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_a_finished_output_of_other_settings_or_damaged_is_refused(source: Path, tmp_path: Path) -> None:
    mfptq.convert(source, tmp_path / "out")
    with pytest.raises(DestinationExistsError, match="other settings"):
        mfptq.convert(source, tmp_path / "out", method="minmax")
    with (tmp_path / "out" / "generation_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DestinationExistsError, match=r"damaged: 'generation_config\.json' is not what"):
        mfptq.convert(source, tmp_path / "out")
    assert not mfptq.convert(source, tmp_path / "out", overwrite=True).already_complete
    assert mfptq.convert(source, tmp_path / "out").already_complete


def test_an_unfinished_run_goes_on_after_the_source_was_touched_or_copied(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        mfptq.convert(source, tmp_path / "out", on_event=stopping_at(mfptq.ShardFinished), max_workers=1)
    shutil.move(source, tmp_path / "moved")
    os.utime(next((tmp_path / "moved").glob("*.safetensors")), ns=(1, 1))
    assert mfptq.convert(tmp_path / "moved", tmp_path / "out").resumed_shards
