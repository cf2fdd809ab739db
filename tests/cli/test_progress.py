"""Off a terminal a job's log tells how far it is: a line for each shard, one at least every minute."""

import io
import logging
from pathlib import Path

from mfptq.cli import progress
from mfptq.cli.progress import BlockLines, ProgressLines, UploadLines
from mfptq.execution.events import Advanced, Planned, ShardFinished
from mfptq.output.publish import StoredFile
from tests.conftest import command


def test_a_line_for_each_shard_and_one_each_minute(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    lines = ProgressLines(stream)
    lines.show(Planned(1_000_000_000))
    for _ in range(130):
        now[0] += 1
        lines.show(Advanced(1_000_000))
    lines.show(ShardFinished("model-\x1b1.safetensors"))
    lines.show(ShardFinished("model-2.safetensors", resumed=True))
    written = stream.getvalue().splitlines()
    assert written == [
        "mfptq: 60.0 MB of 1.00 GB, 1.00 MB/s, about 16 min left",
        "mfptq: 120 MB of 1.00 GB, 1.00 MB/s, about 15 min left",
        "mfptq: 'model-\\x1b1.safetensors' finished: 130 MB of 1.00 GB, 1.00 MB/s, about 14 min left",
        "mfptq: model-2.safetensors was finished before: 130 MB of 1.00 GB, 1.00 MB/s, about 14 min left",
    ]


def test_the_command_writes_them_unless_quiet(source: Path, tmp_path: Path) -> None:
    done = command("convert", source, tmp_path / "out")
    assert sorted(line.split(" finished: ")[0] for line in done.stderr.splitlines()) == [
        f"mfptq: model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    assert command("convert", source, tmp_path / "quiet", "-q").stderr == ""


def test_the_level_of_messages_may_stand_before_or_behind_the_command(source: Path, tmp_path: Path) -> None:
    for arguments in (
        ("-v", "inspect", source),
        ("inspect", source, "-v"),
        ("inspect", source, "--log-level", "debug"),
    ):
        assert command(*arguments).returncode == 0
        assert logging.getLogger("mfptq").level <= logging.INFO
    command("inspect", source)
    assert logging.getLogger("mfptq").level == logging.WARNING
    assert command("inspect", source, "--log-level", "loud").returncode == 2


def test_uploads_have_lines_too(monkeypatch) -> None:
    stream = io.StringIO()
    lines = UploadLines(stream)
    file = StoredFile("model.safetensors", "0" * 64, 3_000_000)
    lines.show_upload(None, 0, 4_000_000)
    assert stream.getvalue() == ""
    lines.show_upload(file, 3_000_000, 4_000_000)
    assert stream.getvalue().startswith("mfptq: model.safetensors finished: 3.00 MB of 4.00 MB, ")
    monkeypatch.setattr("mfptq.cli.progress.MINUTE", 0.0)
    lines.show_upload(None, 3_000_000, 4_000_000)
    assert stream.getvalue().count("\n") == 2


def test_a_walk_through_a_model_has_a_line_each_minute(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    lines = BlockLines(stream, "calibrate")
    for done in range(100, 231):  # an earlier run has done 100
        lines.show(done, 400, "8/64 samples kept")
        now[0] += 1
    assert stream.getvalue().splitlines() == [
        "mfptq: calibrate: 160 of 400 blocks, 8/64 samples kept, about 4 min left",
        "mfptq: calibrate: 220 of 400 blocks, 8/64 samples kept, about 3 min left",
    ]
