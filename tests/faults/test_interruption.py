"""Stops at every kind of moment: nothing half-written passes for whole, and a rerun gives the same bytes."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mfptq
from mfptq.errors import DestinationExistsError, DestinationLockedError, MfptqError, PlanMismatchError, StorageError
from mfptq.output import journal
from tests.conftest import SMALL_EXPERTS, command, digests, write_demo
from tests.faults.faulty import FaultyFiles, fail


def stop_at(source: Path, out: Path, number: int, **options: object) -> None:
    """Fail the Nth rename, so that some shards are finished and the journal says so."""
    faulty = FaultyFiles((out,), frozenset({"replace"}), lambda n: n == number, fail(errno.EIO))
    with faulty, pytest.raises(StorageError, match=r"\(EIO\); rerun the same command to resume"):
        mfptq.convert(source, out, max_workers=1, **options)
    assert list(out.glob("*.safetensors"))
    assert not (out / "config.json").exists()


@pytest.mark.case(104)
def test_a_flipped_finished_shard_is_redone(source, tmp_path, expected) -> None:
    out = tmp_path / "out"
    stop_at(source, out, 4)
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    finished = len(list(out.glob("*.safetensors")))
    assert mfptq.convert(source, out).resumed_shards < finished
    assert digests(out) == expected


@pytest.mark.case(103)
def test_a_damaged_journal_costs_only_time(source, tmp_path, expected) -> None:
    out = tmp_path / "out"
    stop_at(source, out, 4)
    whole = (out / ".mfptq" / "journal").read_bytes()
    for cut in (0, 5, 70, len(whole) // 2, len(whole) - 1):
        again = tmp_path / f"out{cut}"
        shutil.copytree(out, again)
        (again / ".mfptq" / "journal").write_bytes(whole[:cut])
        report = mfptq.convert(source, again)
        assert report.resumed_shards == max(0, whole[:cut].count(b"\n") - 1)
        assert digests(again) == expected, cut


def rewritten(out: Path, change) -> None:
    """Change what a journal says, with the right checksums."""
    path = out / ".mfptq" / "journal"
    values = [json.loads(line.split(b" ", 1)[1]) for line in path.read_bytes().splitlines()]
    path.write_bytes(b"".join(journal._line(value) for value in change(values)))


@pytest.mark.case(103)
def test_a_journal_of_another_version_is_refused(source, tmp_path) -> None:
    out = tmp_path / "out"
    stop_at(source, out, 4)
    before = digests(out)
    rewritten(out, lambda values: [{"plan": {**values[0]["plan"], "format": "999"}}, *values[1:]])
    del before[".mfptq/journal"]
    with pytest.raises(PlanMismatchError, match="other format"):
        mfptq.convert(source, out)
    assert {name: digest for name, digest in digests(out).items() if name != ".mfptq/journal"} == before


ODD_LINES = [
    {"shard": {"name": "x"}},
    {"shard": []},
    {"other": 1},
    [],
    None,
    {"shard": {"name": 1, "sha256": 2, "size": 3, "kinds": 4}},
]


@pytest.mark.parametrize("line", ODD_LINES, ids=str)
@pytest.mark.case(103)
def test_lines_of_another_version_count_as_absent(line, source, tmp_path, expected) -> None:
    out = tmp_path / "out"
    stop_at(source, out, 4)
    rewritten(out, lambda values: [*values, line])
    assert mfptq.convert(source, out).resumed_shards >= 1
    assert digests(out) == expected


@pytest.mark.case(105)
def test_other_settings_are_refused_and_touch_nothing(source, tmp_path) -> None:
    out = tmp_path / "out"
    stop_at(source, out, 4)
    before = digests(out)
    with pytest.raises(PlanMismatchError, match="settings"):
        mfptq.convert(source, out, method="minmax")
    write_demo(source.parent / "other", SMALL_EXPERTS)
    with pytest.raises(PlanMismatchError, match="source"):
        mfptq.convert(source.parent / "other", out)
    assert digests(out) == before
    assert mfptq.convert(source, out, method="minmax", overwrite=True).resumed_shards == 0


def test_resuming_trusts_finished_shards(source, tmp_path, expected) -> None:
    stop_at(source, tmp_path / "out", 4)
    assert mfptq.convert(source, tmp_path / "out").resumed_shards >= 1
    assert digests(tmp_path / "out") == expected


@pytest.mark.case(107)
def test_the_second_run_is_refused(source, tmp_path) -> None:
    from filelock import FileLock

    (tmp_path / "out" / ".mfptq").mkdir(parents=True)
    with FileLock(tmp_path / "out" / ".mfptq" / "lock"):
        (tmp_path / "out" / ".mfptq" / "pid").write_text("4242\n")
        with pytest.raises(DestinationLockedError, match="4242"):
            mfptq.convert(source, tmp_path / "out")


def test_a_finished_output_is_left_as_it_is_unless_overwritten(source, output, expected) -> None:
    assert mfptq.convert(source, output).already_complete
    with pytest.raises(MfptqError, match="finished conversion"):
        mfptq.convert(source, output, method="minmax")
    assert digests(output) == expected
    mfptq.convert(source, output, overwrite=True)
    assert digests(output) == expected


def test_an_unfinished_output_of_another_checkpoint_is_replaced_whole(source, tmp_path, expected) -> None:
    write_demo(tmp_path / "other", SMALL_EXPERTS, shards=5)
    (tmp_path / "other" / "vocabulary.txt").write_text("words")
    out = tmp_path / "out"
    stop_at(tmp_path / "other", out, 5)
    (out / "vocabulary.txt").write_text("words")
    mfptq.convert(source, out, overwrite=True)
    assert digests(out) == expected


@pytest.mark.case(79)
def test_foreign_files_beside_a_work_folder_are_untouched(source, tmp_path) -> None:
    out = tmp_path / "out"
    (out / ".mfptq").mkdir(parents=True)
    for name in ("config.json", "SHA256", "README.md"):
        (out / name).write_text("mine")
    before = digests(out)
    for overwrite in (False, True):
        with pytest.raises(DestinationExistsError, match="not ours"):
            mfptq.convert(source, out, overwrite=overwrite)
    assert digests(out) == before


def test_a_finished_output_whose_tidying_was_cut_short_is_finished(source, output, expected) -> None:
    (output / ".mfptq").mkdir()
    (output / ".mfptq" / "lock").touch()
    assert mfptq.convert(source, output).already_complete
    assert not (output / ".mfptq").exists()
    assert digests(output) == expected


@pytest.mark.case(86)
def test_finished_shards_outlive_a_read_error(source, tmp_path, expected) -> None:
    out = tmp_path / "out"
    reads = FaultyFiles((source,), frozenset({"preadv"}))
    with reads:
        mfptq.convert(source, tmp_path / "count", max_workers=1)
    last = len(reads.counted)
    faulty = FaultyFiles((source,), frozenset({"preadv"}), lambda n: n == last, fail(errno.EIO))
    with faulty, pytest.raises(StorageError, match=r"EIO.*rerun the same command"):
        mfptq.convert(source, out, max_workers=1)
    finished = len(list(out.glob("*.safetensors")))
    assert mfptq.convert(source, out).resumed_shards == finished >= 1
    assert digests(out) == expected


@pytest.mark.case(93)
def test_a_temporary_that_cannot_be_removed_hides_no_error(source, tmp_path, expected) -> None:
    out = tmp_path / "out"

    def fault(name, real, args, kwargs):
        if name == "unlink" and not str(args[0]).endswith(".partial"):
            return real(*args, **kwargs)
        return fail(errno.ENOSPC if name == "pwrite" else errno.EACCES)(name, real, args, kwargs)

    faulty = FaultyFiles((out,), frozenset({"pwrite", "unlink"}), lambda n: n > 4, fault)
    with faulty, pytest.raises(StorageError, match="ENOSPC"):
        mfptq.convert(source, out, max_workers=1)
    assert list(out.rglob("*.partial"))
    mfptq.convert(source, out)
    assert digests(out) == expected


@pytest.mark.case(82)
def test_no_room_is_said_before_anything_is_written(source, tmp_path, monkeypatch) -> None:
    real = os.statvfs

    def full(path):
        status = list(real(path))
        status[4] = 1
        return os.statvfs_result(status)

    monkeypatch.setattr(os, "statvfs", full)
    with pytest.raises(MfptqError, match=r"needs [\d.]+ MB, [\d.]+ kB are free") as caught:
        mfptq.convert(source, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()


def as_nobody(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user whom mode bits stop."""
    line = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", "from mfptq.cli.main import run; run()"]
    environment = {**os.environ, "HOME": "/nonexistent", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*line, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, env=environment
    )


@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="needs root and setpriv")
@pytest.mark.case(81)
def test_a_folder_that_may_not_be_written(source, tmp_path) -> None:
    shared = Path("/tmp") / f"mfptq-faults-{os.getpid()}"
    try:
        shutil.copytree(source, shared / "source")
        (shared / "closed").mkdir(mode=0o755)
        (shared / "secret").mkdir(mode=0o700)
        shared.chmod(0o755)
        probe = as_nobody("--version")
        if probe.returncode:
            pytest.skip("nobody cannot run this interpreter")
        unwritable = f"'{shared / 'closed'}' may not be written to"
        for place, said in (("closed/out", unwritable), ("closed", unwritable), ("secret/out", "Permission denied")):
            done = as_nobody("convert", shared / "source", shared / place)
            assert done.returncode == 5, done.stderr
            assert said in done.stderr
            assert done.stderr.count("\n") == 1
        assert not list((shared / "closed").iterdir())
    finally:
        shutil.rmtree(shared, ignore_errors=True)


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs root and unshare")
@pytest.mark.case(80)
def test_the_source_under_another_name(source, tmp_path) -> None:
    (tmp_path / "mounted").mkdir()
    inner = f"mount --bind {source} {tmp_path / 'mounted'} && exec {sys.executable} -c 'from mfptq.cli.main import run; run()' convert {source} {tmp_path}/mounted"
    before = digests(source)
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", inner], capture_output=True, text=True, timeout=60, check=False
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("may not mount")
    assert done.returncode == 5, done.stderr
    assert "the source" in done.stderr
    assert digests(source) == before


@pytest.mark.case(85)
def test_a_file_size_limit(source, tmp_path, expected) -> None:
    import resource
    import signal

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, 2**15))

    line = [
        sys.executable,
        "-c",
        "from mfptq.cli.main import run; run()",
        "convert",
        str(source),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, preexec_fn=limit)
    assert done.returncode == 5, done.stderr
    assert "EFBIG" in done.stderr
    assert command("convert", source, tmp_path / "out").returncode == 0
    assert digests(tmp_path / "out") == expected


@pytest.mark.case(106)
def test_a_companion_that_shrinks_while_it_is_copied(source, tmp_path) -> None:
    out = tmp_path / "out"

    def ends_early(name, real, args, kwargs):
        return 0

    (source / "vocabulary.txt").write_bytes(b"word\n" * 100)
    with FaultyFiles((source,), frozenset({"preadv"})) as reads:
        mfptq.convert(source, tmp_path / "out", max_workers=1)
    shutil.rmtree(out)
    last = len(reads.counted)
    faulty = FaultyFiles((source,), frozenset({"preadv"}), lambda n: n == last, ends_early)
    with faulty, pytest.raises(MfptqError, match=r"'vocabulary\.txt' ended before byte 500: truncated\?") as caught:
        mfptq.convert(source, out, max_workers=1)
    assert caught.value.exit_code == 3
    assert not out.exists()


@pytest.mark.case(104)
def test_finished_shards_that_are_gone_cut_or_no_files_are_redone(source, tmp_path, expected) -> None:
    for number, damage in enumerate((Path.unlink, lambda path: os.truncate(path, 10), into_folder)):
        out = tmp_path / f"out{number}"
        stop_at(source, out, 4)
        finished = sorted(out.glob("*.safetensors"))
        damage(finished[0])
        if finished[0].is_dir():
            finished[0].rmdir()
            finished[0].symlink_to(finished[1])
        assert mfptq.convert(source, out).resumed_shards == len(finished) - 1
        assert digests(out) == expected


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def test_temporaries_of_the_living_are_left_alone(source, tmp_path, expected) -> None:
    out = tmp_path / "out"
    stop_at(source, out, 4)
    living, dead = os.getppid(), 2**40
    for pid in (living, dead, "x"):
        (out / ".mfptq" / f"a.safetensors.{pid}.0.partial").write_text("")
    stop_at(source, out, 3)
    assert {path.name for path in (out / ".mfptq").glob("*.partial")} == {f"a.safetensors.{living}.0.partial"}
    mfptq.convert(source, out)
    assert digests(out) == expected
