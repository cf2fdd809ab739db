"""Parts of a plan, made by several machines into one folder: the same bytes as one run, whatever happens on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mfptq
from mfptq.errors import DestinationError, DestinationExistsError, PlanMismatchError, UsageError
from mfptq.output.parts import machine
from mfptq.planning.parts import Part
from tests.calibration.files import calibrate as write_calibration
from tests.conftest import command, digests, sampled
from tests.encodings.test_convert import SMALL, twins

RUN_PART = """
import os, signal, sys
import mfptq
def on_event(event):
    if sys.argv[4] == "kill" and isinstance(event, mfptq.ShardFinished):
        os.kill(os.getpid(), signal.SIGKILL)
with mfptq.plan(sys.argv[1]) as plan:
    plan.run_part(sys.argv[2], sys.argv[3], on_event=on_event)
"""


def start_part(source: Path, output: Path, part: str, how: str = "") -> subprocess.Popen:
    """Begin a part in a process of its own; with `how` "kill" it kills itself after its first shard."""
    return subprocess.Popen([sys.executable, "-c", RUN_PART, source, output, part, how])


@pytest.mark.parametrize(
    ("which", "count"),
    sampled([("source", 1), ("source", 3), ("moe_source", 2)], [("source", 2), ("moe_source", 1), ("moe_source", 3)]),
)
def test_parts_in_any_order_give_the_bytes_of_one_run(which, count, request, tmp_path) -> None:
    source, output = request.getfixturevalue(which), tmp_path / "out"
    mfptq.convert(source, tmp_path / "whole")
    for number in range(count, 0, -1):
        with mfptq.plan(source) as plan:
            report = plan.run_part(output, f"{number}/{count}", max_workers=number)
        assert (report.resumed, report.all_shards) == (0, len(plan._planned.shards))
        assert not (output / "config.json").exists()
        assert not list(output.rglob("*.partial"))
    with mfptq.plan(source) as plan:
        assert plan.finish(output).resumed_shards == report.all_shards
    assert digests(output) == digests(tmp_path / "whole")


def test_calibrated_parts_give_the_bytes_of_one_run(source: Path, tmp_path: Path) -> None:
    calibration = write_calibration(source, tmp_path / "x.calibration.safetensors")
    mfptq.convert(source, tmp_path / "whole", calibration=calibration)
    with mfptq.plan(source, calibration=calibration) as plan:
        for number in (1, 2):
            plan.run_part(tmp_path / "out", f"{number}/2")
        plan.finish(tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_parts_of_a_quantized_source_whose_scales_lie_in_other_shards(tmp_path: Path) -> None:
    source, _cast = twins(tmp_path, SMALL, "blocks, F32")
    mfptq.convert(source, tmp_path / "whole")
    with mfptq.plan(source) as plan:
        for part in ("2/3", "1/3", "3/3"):
            plan.run_part(tmp_path / "out", part)
        plan.finish(tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_fused_groups_reach_from_one_part_into_another(source: Path) -> None:
    """Or the tests of equal bytes would show nothing about them."""
    with mfptq.plan(source) as plan:
        planned = plan._planned
        first = {shard.name for shard in Part(1, 2).of(planned)}
        sides = [{weight.shard in first for weight in planned.members(each)} for each in planned.weights()]
    assert {True, False} in sides


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 100])
def test_each_shard_is_in_one_part(source: Path, count: int) -> None:
    with mfptq.plan(source) as plan:
        parts = [Part(number, count).of(plan._planned) for number in range(1, count + 1)]
        assert [shard for part in parts for shard in part] == list(plan._planned.shards)
        sizes = [sum(plan._planned.checkpoint.shard(shard.name).header.data_bytes for shard in part) for part in parts]
        largest = max(shard.header.data_bytes for shard in plan._planned.checkpoint.shards)
        assert max(sizes) <= plan.source_bytes / count + largest


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "3", "1/2/3", "-1/3", "a/b", "", "1 / 2"])
def test_parts_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="part"):
        Part.parse(text)


def test_what_is_missing_is_named_and_nothing_is_lost(source: Path, tmp_path: Path, expected) -> None:
    output = tmp_path / "out"
    with mfptq.plan(source) as plan:
        with pytest.raises(DestinationError, match="lacks"):
            plan.finish(output)
        assert not output.exists()
        plan.run_part(output, "2/3")
        before = digests(output)
        missing = Part(1, 3).of(plan._planned)[0].name
        with pytest.raises(DestinationError, match=f"lacks .* shards.*{missing}"):
            plan.finish(output)
        assert digests(output) == before
        for part in ("1/3", "3/3"):
            plan.run_part(output, part)
        plan.finish(output)
    assert digests(output) == expected


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "torn record", "foreign record"])
def test_a_damaged_shard_is_found_and_made_again(damage: str, source: Path, tmp_path: Path, expected) -> None:
    output = tmp_path / "out"
    with mfptq.plan(source) as plan:
        for part in ("1/2", "2/2"):
            plan.run_part(output, part)
        name = Part(2, 2).of(plan._planned)[0].name
        shard, record = output / name, output / ".mfptq" / "parts" / "done" / name
        content = shard.read_bytes()
        if damage == "flip":
            shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif damage == "cut":
            shard.write_bytes(content[:-1])
        elif damage == "remove":
            shard.unlink()
        elif damage == "torn record":
            record.write_bytes(record.read_bytes()[:-3])
        else:
            record.write_bytes((record.parent / Part(1, 2).of(plan._planned)[0].name).read_bytes())
        with pytest.raises(DestinationError, match=f"lacks 1 of .*{name}"):
            plan.finish(output)
        assert not (output / "config.json").exists()
        report = plan.run_part(output, "2/2")
        assert report.resumed == len(report.shards) - 1
        plan.finish(output)
    assert digests(output) == expected


def test_a_killed_part_is_resumed(source: Path, tmp_path: Path, expected) -> None:
    output = tmp_path / "out"
    assert start_part(source, output, "1/1", "kill").wait(60) == -signal.SIGKILL
    with mfptq.plan(source) as plan:
        assert plan.run_part(output, "1/1").resumed >= 1
        assert not list(output.rglob("*.partial")), "those of the process that was killed on this machine"
        plan.finish(output)
    assert digests(output) == expected


def test_attempts_at_the_same_part_at_once_are_harmless(source: Path, tmp_path: Path, expected) -> None:
    output = tmp_path / "out"
    attempts = [start_part(source, output, "1/1") for _ in range(2)]
    assert [attempt.wait(100) for attempt in attempts] == [0, 0]
    with mfptq.plan(source) as plan:
        plan.finish(output)
    assert digests(output) == expected


def test_parts_need_no_lock(source: Path, tmp_path: Path, expected, monkeypatch) -> None:
    def refuse(*_args, **_options) -> None:
        raise AssertionError("a part took a lock")

    monkeypatch.setattr("mfptq.output.destination.FileLock", refuse)
    with mfptq.plan(source) as plan:
        for part in ("1/2", "2/2"):
            plan.run_part(tmp_path / "out", part)
        monkeypatch.undo()
        plan.finish(tmp_path / "out")
    assert digests(tmp_path / "out") == expected


def test_parts_of_two_plans_do_not_mix(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with mfptq.plan(source) as plan, mfptq.plan(source, method="minmax") as other:
        plan.run_part(output, "1/2")
        before = digests(output)
        for attempt in (lambda: other.run_part(output, "2/2"), lambda: other.finish(output), lambda: other.run(output)):
            with pytest.raises(PlanMismatchError, match="other settings"):
                attempt()
        assert digests(output) == before


def test_a_run_without_parts_takes_over_what_parts_have_done(source: Path, tmp_path: Path, expected) -> None:
    with mfptq.plan(source) as plan:
        part = plan.run_part(tmp_path / "out", "1/2")
        assert plan.run(tmp_path / "out").resumed_shards == len(part.shards)
    assert digests(tmp_path / "out") == expected


def test_a_part_takes_over_what_an_interrupted_run_has_done(source: Path, tmp_path: Path, expected) -> None:
    def stop(event: mfptq.Event) -> None:
        if isinstance(event, mfptq.ShardFinished):
            raise KeyboardInterrupt

    with mfptq.plan(source) as plan:
        with pytest.raises(KeyboardInterrupt):
            plan.run(tmp_path / "out", on_event=stop, max_workers=1)
        assert plan.run_part(tmp_path / "out", "1/1").resumed >= 1
        plan.finish(tmp_path / "out")
    assert digests(tmp_path / "out") == expected


def test_overwriting_forgets_parts(source: Path, tmp_path: Path, expected) -> None:
    with mfptq.plan(source, method="minmax") as plan:
        plan.run_part(tmp_path / "out", "1/2")
    assert mfptq.convert(source, tmp_path / "out", overwrite=True).resumed_shards == 0
    assert digests(tmp_path / "out") == expected


def test_a_part_leaves_foreign_and_finished_folders_alone(source: Path, tmp_path: Path) -> None:
    foreign, finished = tmp_path / "foreign", tmp_path / "finished"
    foreign.mkdir()
    (foreign / "note").write_text("mine")
    mfptq.convert(source, finished)
    (tmp_path / "no config").mkdir()
    for name in ("SHA256SUMS", "mfptq_report.json"):
        (tmp_path / "no config" / name).write_bytes((finished / name).read_bytes())
    for folder in (foreign, finished, tmp_path / "no config"):
        before = digests(folder)
        with mfptq.plan(source) as plan, pytest.raises(DestinationExistsError):
            plan.run_part(folder, "1/2")
        assert digests(folder) == before


def test_temporaries_of_other_machines_stay_until_the_output_is_finished(
    source: Path, tmp_path: Path, expected
) -> None:
    output, parts = tmp_path / "out", tmp_path / "out" / ".mfptq" / "parts"
    theirs, gone = parts / "0123456789ab" / "x.1.00000000.partial", parts / machine() / "x.4194305.0.partial"
    for path in (theirs, gone):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
    with mfptq.plan(source) as plan:
        plan.run_part(output, "1/1")
        assert theirs.exists()
        assert not gone.exists(), "no process of this machine has that id"
        plan.finish(output)
    assert digests(output) == expected


def test_the_machine_is_named_by_where_process_ids_are_unique() -> None:
    code = "from mfptq.output.parts import machine; print(machine())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == machine()
    apart = subprocess.run(
        ["unshare", "-U", "-r", "-p", "-f", sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if apart.returncode:
        pytest.skip("this machine lets nobody make a namespace of processes")
    assert apart.stdout.strip() != machine()


def test_progress_of_a_part_is_of_its_own_bytes(source: Path, tmp_path: Path) -> None:
    events: list[mfptq.Event] = []
    with mfptq.plan(source) as plan:
        report = plan.run_part(tmp_path / "out", "1/2", on_event=events.append)
    assert [event.total_bytes for event in events if isinstance(event, mfptq.Planned)] == [report.source_bytes]
    assert sum(event.source_bytes for event in events if isinstance(event, mfptq.Advanced)) == report.source_bytes
    assert 0 < report.source_bytes < plan.source_bytes


def test_the_command_line(source: Path, tmp_path: Path, expected) -> None:
    output = tmp_path / "out"
    first = command("convert", source, output, "--shards", "1/2")
    assert first.returncode == 0, first.stderr
    assert re.search(r"^  [12] of 3 shards$", first.stdout, re.MULTILINE)
    early = command("finish", source, output)
    assert (early.returncode, early.stdout, early.stderr.count("\n")) == (5, "", 1)
    assert "lacks" in early.stderr
    second = command("convert", source, output, "--shards", "2/2", "--json")
    assert json.loads(second.stdout)["resumed"] == 0
    done = command("finish", source, output, "--json")
    assert json.loads(done.stdout)["destination"] == os.fspath(output)
    assert digests(output) == expected
    for wrong in (("--shards", "3/2"), ("--shards", "1/2", "--overwrite"), ("--shards", "1/2", "--dry-run")):
        refused = command("convert", source, output, *wrong)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert digests(output) == expected
