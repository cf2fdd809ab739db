"""Off a terminal a job's log tells how far it is: a line for each shard, one at least every minute."""

import io
from pathlib import Path

from mfptq.cli import text
from mfptq.execution.events import Advanced, Planned, ShardFinished
from tests.conftest import command


def test_a_line_for_each_shard_and_one_each_minute(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(text.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    lines = text.ProgressLines(stream)
    lines.show(Planned(1_000_000_000))
    for _ in range(130):
        now[0] += 1
        lines.show(Advanced(1_000_000))
    lines.show(ShardFinished("model-\x1b1.safetensors"))
    lines.show(ShardFinished("model-2.safetensors", resumed=True))
    written = stream.getvalue().splitlines()
    assert written == [
        "mfptq: 60.0 MB of 1.00 GB, 1.00 MB/s, about 940 s left",
        "mfptq: 120 MB of 1.00 GB, 1.00 MB/s, about 880 s left",
        "mfptq: 'model-\\x1b1.safetensors' finished: 130 MB of 1.00 GB, 1.00 MB/s, about 870 s left",
        "mfptq: model-2.safetensors was finished before: 130 MB of 1.00 GB, 1.00 MB/s, about 870 s left",
    ]


def test_the_command_writes_them_unless_quiet(source: Path, tmp_path: Path) -> None:
    done = command("convert", source, tmp_path / "out")
    assert sorted(line.split(" finished: ")[0] for line in done.stderr.splitlines()) == [
        f"mfptq: model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    assert command("convert", source, tmp_path / "quiet", "-q").stderr == ""
