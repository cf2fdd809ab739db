"""Stops at every kind of moment: nothing half-written passes for whole, and a rerun gives the same bytes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mfptq
from mfptq import destination, files, journal, partial
from mfptq.errors import DestinationLockedError, MfptqError, PlanMismatchError, StorageError
from tests.conftest import command, digests


class FaultyOs:
    """The `os` module, except that the Nth of some calls fails or ends the process."""

    def __init__(self, calls: set[str], number: int, fault: OSError | None) -> None:
        self.calls, self.left, self.fault = calls, number, fault

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in self.calls:
            return real

        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                if self.fault is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise self.fault
            return real(*args, **kwargs)

        return call


def install(monkeypatch, faulty: FaultyOs) -> None:
    for module in (files, partial, journal, destination):
        monkeypatch.setattr(module, "os", faulty)


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, str]:
    mfptq.convert(source, tmp_path / "expected")
    return digests(tmp_path / "expected")


STORAGE = [("pwrite", errno.ENOSPC), ("pwrite", errno.EDQUOT), ("fsync", errno.EIO), ("replace", errno.EIO),
           ("posix_fallocate", errno.ENOSPC), ("open", errno.EMFILE), ("open", errno.EROFS)]  # fmt: skip


@pytest.mark.parametrize(("call", "code"), STORAGE, ids=lambda value: str(value))
def test_case_83_92_every_nth_storage_error(call, code, source, tmp_path, expected, monkeypatch) -> None:
    number, failures = 0, 0
    while True:
        number += 1
        out = tmp_path / f"out{number}"
        faulty = FaultyOs({call}, number, OSError(code, os.strerror(code)))
        with monkeypatch.context() as patch:
            install(patch, faulty)
            try:
                mfptq.convert(source, out, workers=1)
            except MfptqError as error:
                assert error.exit_code in (3, 5)  # noqa: PT017 - most calls never fail
                failures += 1
                done = False
            else:
                done = True
        if done and faulty.left > 0:
            break
        if not done:
            assert not (out / "config.json").exists() or number > 1
            assert not list(out.rglob("*.safetensors.*partial"))
        mfptq.convert(source, out) if not done else None
        assert digests(out) == expected, (call, number)
        if number > 12:
            number += 4
    assert failures > 3


KILLED = {"open", "pwrite", "fsync", "replace", "unlink", "posix_fallocate"}
_CHILD = """
import sys
from pathlib import Path
from tests.faults.test_interruption import FaultyOs, KILLED, destination, files, journal, partial
faulty = FaultyOs(KILLED, int(sys.argv[3]), None)
for module in (files, partial, journal, destination):
    module.os = faulty
import mfptq
mfptq.convert(sys.argv[1], sys.argv[2], workers=1)
"""


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8, 13, 21, 34, 55, 80, 100, 120, 140, 150])
def test_case_96_killed_at_a_system_call(number, source, tmp_path, expected) -> None:
    arguments = [sys.executable, "-c", _CHILD, str(source), str(tmp_path / "out"), str(number)]
    root = Path(__file__).parents[2]
    done = subprocess.run(arguments, capture_output=True, timeout=60, check=False, cwd=root)
    if done.returncode == 0:
        assert digests(tmp_path / "out") == expected
        return
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    if not (tmp_path / "out" / "config.json").exists():
        resumed = command("convert", source, tmp_path / "out")
        assert resumed.returncode == 0, resumed.stderr
    assert digests(tmp_path / "out") == expected


def stop_at(source: Path, out: Path, monkeypatch, number: int) -> None:
    """Fail the Nth rename, so that some shards are finished and the journal says so."""
    with monkeypatch.context() as patch:
        install(patch, FaultyOs({"replace"}, number, OSError(errno.EIO, "error")))
        with pytest.raises(StorageError):
            mfptq.convert(source, out, workers=1)


def test_case_104_a_flipped_finished_shard_is_redone(source, tmp_path, expected, monkeypatch) -> None:
    out = tmp_path / "out"
    stop_at(source, out, monkeypatch, 4)
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    mfptq.convert(source, out)
    assert digests(out) == expected


def test_case_103_a_damaged_journal_costs_only_time(source, tmp_path, expected, monkeypatch) -> None:
    out = tmp_path / "out"
    stop_at(source, out, monkeypatch, 4)
    whole = (out / ".mfptq" / "journal").read_bytes()
    for cut in (0, 5, 70, len(whole) // 2, len(whole) - 1):
        (out / ".mfptq").mkdir(exist_ok=True)
        (out / "config.json").unlink(missing_ok=True)
        (out / ".mfptq" / "journal").write_bytes(whole[:cut])
        mfptq.convert(source, out)
        assert digests(out) == expected, cut


def test_case_105_other_settings_are_refused_and_touch_nothing(source, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    stop_at(source, out, monkeypatch, 4)
    before = digests(out)
    with pytest.raises(PlanMismatchError, match="settings"):
        mfptq.convert(source, out, method="minmax")
    os.utime(next(source.glob("*.safetensors")))
    with pytest.raises(PlanMismatchError, match="source"):
        mfptq.convert(source, out)
    assert digests(out) == before
    assert mfptq.convert(source, out, method="minmax", overwrite=True).resumed_shards == 0


def test_resuming_trusts_finished_shards(source, tmp_path, expected, monkeypatch) -> None:
    stop_at(source, tmp_path / "out", monkeypatch, 4)
    assert mfptq.convert(source, tmp_path / "out").resumed_shards >= 1
    assert digests(tmp_path / "out") == expected


def test_case_107_the_second_run_is_refused(source, tmp_path) -> None:
    from filelock import FileLock

    (tmp_path / "out" / ".mfptq").mkdir(parents=True)
    with FileLock(tmp_path / "out" / ".mfptq" / "lock"):
        (tmp_path / "out" / ".mfptq" / "pid").write_text("4242\n")
        with pytest.raises(DestinationLockedError, match="4242"):
            mfptq.convert(source, tmp_path / "out")


def test_a_finished_output_is_refused_unless_overwritten(source, tmp_path, expected) -> None:
    with pytest.raises(MfptqError, match="finished conversion"):
        mfptq.convert(source, tmp_path / "expected")
    mfptq.convert(source, tmp_path / "expected", overwrite=True)
    assert digests(tmp_path / "expected") == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_case_97_98_signals(number, code, tmp_path) -> None:
    from mfptq.demo import DemoShape, write_demo

    write_demo(tmp_path / "big", DemoShape(hidden=2048, intermediate=6144, layers=8, vocabulary=64))
    line = [sys.executable, "-c", "from mfptq.cli import run; run()", "convert", tmp_path / "big", tmp_path / "out"]
    process = subprocess.Popen([*map(str, line), "--max-workers", "1"], stderr=subprocess.PIPE, text=True)
    journal_path = tmp_path / "out" / ".mfptq" / "journal"
    while not journal_path.exists() and process.poll() is None:
        pass
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == code, text
    assert text == "mfptq: error: stopped; rerun the same command to resume\n"
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").rglob("*.partial"))
