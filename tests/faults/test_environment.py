"""The world around a run: signals, closed outputs, limits, locales, other runs; the bytes are the same in all of them."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mfptq
from mfptq.demo import DemoShape, write_demo
from mfptq.errors import DestinationLockedError, MemoryBudgetError
from tests.conftest import SMALL, command, command_apart, digests, sampled

RUN = "from mfptq.cli.main import run; run()"
STOPPED = "mfptq: error: stopped; rerun the same command to resume\n"


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """A checkpoint with weights larger than a tile."""
    folder = tmp_path_factory.mktemp("big") / "source"
    write_demo(folder, DemoShape(hidden=1024, intermediate=2304, layers=1, vocabulary=64))
    return folder


@pytest.fixture(scope="module")
def converted(big: Path) -> dict[str, str]:
    """The files of a plain conversion of it."""
    mfptq.convert(big, big.parent / "expected")
    return digests(big.parent / "expected")


SLOWLY = """
import time
from mfptq.execution.worker_memory import WorkerMemory
quantize = WorkerMemory.quantize
WorkerMemory.quantize = lambda *arguments: (time.sleep(0.3), quantize(*arguments))[1]
"""


def begun(source: Path, out: Path, *, prefix: str = SLOWLY) -> subprocess.Popen[str]:
    """Start a conversion that takes long enough to be stopped in the middle, and return when its journal exists."""
    line = [sys.executable, "-c", prefix + RUN, "convert", str(source), str(out), "--max-workers", "1"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / ".mfptq" / "journal").exists() and process.poll() is None:
        time.sleep(0.001)
    return process


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.case(97, 98, 99)
@pytest.mark.usefixtures("default_signals")
def test_a_signal_stops_tidily(number: int, code: int, source: Path, tmp_path: Path) -> None:
    process = begun(source, tmp_path / "out")
    process.send_signal(number)
    out, text = process.communicate(timeout=60)
    assert (process.returncode, text, out) == (code, STOPPED, "")
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").rglob("*.partial"))


@pytest.mark.parametrize(("number", "code"), sampled(SIGNALS[1:2], SIGNALS[::2]))
@pytest.mark.case(99)
@pytest.mark.usefixtures("default_signals")
def test_a_second_signal_stops_at_once(number: int, code: int, source: Path, tmp_path: Path) -> None:
    # The first signal finds a worker that never ends its piece of work; the second must not wait for it.
    mark = tmp_path / "stuck"
    stuck = f"open({str(mark)!r}, 'w'), time.sleep(60)"
    prefix = f"import time; from mfptq.execution.worker_memory import WorkerMemory; WorkerMemory.quantize = lambda *a: ({stuck}); "
    process = begun(source, tmp_path / "out", prefix=prefix)
    while not mark.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(number)
    out, text = process.communicate(timeout=5)
    assert (process.returncode, text, out) == (code, STOPPED, "")
    assert not (tmp_path / "out" / "config.json").exists()
    assert command("convert", source, tmp_path / "out").returncode == 0
    assert not list((tmp_path / "out").rglob("*.partial"))


@pytest.mark.case(99)
@pytest.mark.usefixtures("default_signals")
def test_nohup_stays_nohup(source: Path, tmp_path: Path) -> None:
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = begun(source, tmp_path / "out", prefix=SLOWLY + ignoring)
    process.send_signal(signal.SIGHUP)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 0
    assert {line.split()[2] for line in text.splitlines()} == {"finished:"}, (
        "progress, off a terminal, and nothing else"
    )


INTERRUPTED = """
import os, runpy, signal, sys
from itertools import count

imports, last = count(1), int(sys.argv.pop(1))

def interrupt(event, arguments):
    if event == "import" and "mfptq.cli" in sys.modules and next(imports) == last:
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
runpy.run_module("mfptq", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("imports", sampled([1, 30, 60, 90, 150, 300], [*range(2, 40, 3), *range(45, 400, 25)]))
@pytest.mark.case(97)
@pytest.mark.usefixtures("default_signals")
def test_ctrl_c_while_modules_are_imported_prints_no_traceback(imports: int, source: Path) -> None:
    """Let SIGINT come at the first import of the command line, or so many later: before its handler is set, and after."""
    line = [sys.executable, "-c", INTERRUPTED, str(imports), "plan", "--no-estimate", str(source)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    by_default = (-signal.SIGINT, "")  # a shell gives this code as 130
    assert (done.returncode, done.stderr) in [by_default, (130, STOPPED)]


@pytest.mark.parametrize("redirection", ["> /dev/full", ">&-", "| true"])
@pytest.mark.case(94)
def test_output_that_nobody_takes(redirection: str, source: Path, tmp_path: Path) -> None:
    line = f"set -o pipefail; {sys.executable} -c '{RUN}' convert {source} {tmp_path / 'out'} {redirection}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    if redirection != "| true":  # a short text may have gone into the pipe before it was closed
        assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    assert mfptq.verify(tmp_path / "out", source).ok


@pytest.mark.case(94)
def test_closed_stderr(source: Path, tmp_path: Path) -> None:
    for redirection in ("2> /dev/full", "2>&-"):
        line = f"{sys.executable} -c '{RUN}' convert {source / 'nothing'} {tmp_path / 'out'} {redirection}"
        assert subprocess.run(["bash", "-c", line], capture_output=True, timeout=60, check=False).returncode == 3


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
@pytest.mark.case(95)
def test_modes_are_as_umask_says(mask: int, mode: int, source: Path, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        mfptq.convert(source, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {mode}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.case(107)
def test_a_second_run_is_refused_by_pid_and_harms_nothing(source: Path, tmp_path: Path) -> None:
    first = begun(source, tmp_path / "out")
    first.send_signal(signal.SIGSTOP)  # it may not finish before the second begins
    second = command("convert", source, tmp_path / "out")
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=120)
    assert second.returncode == 5, second.stderr
    assert f"in use by pid '{first.pid}'" in second.stderr
    assert first.returncode == 0
    assert mfptq.verify(tmp_path / "out", source).ok


NO_LOCK = "import filelock; filelock.FileLock.acquire = lambda self, timeout=0: None; "


@pytest.mark.case(108)
@pytest.mark.parametrize("count", sampled([2], [3, 3, 5]))
def test_runs_with_locks_that_do_nothing(count: int, source: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    out = tmp_path / "out"
    line = [sys.executable, "-c", NO_LOCK + RUN, "convert", str(source), str(out), "-q"]
    runs = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(count)]
    ends = [(run.communicate(timeout=60)[1], run.returncode) for run in runs]
    assert all(code in (0, 5) for _, code in ends), ends
    last = command("convert", source, out)
    assert last.returncode == 0 or "finished conversion" in last.stderr, last.stderr
    shutil.rmtree(out / ".mfptq", ignore_errors=True)
    assert digests(out) == expected, ends


@pytest.mark.case(109)
def test_a_lock_left_by_a_killed_run_is_taken_over(source: Path, tmp_path: Path) -> None:
    process = begun(source, tmp_path / "out")
    process.kill()
    process.communicate(timeout=60)
    assert (tmp_path / "out" / ".mfptq" / "lock").exists()
    assert command("convert", source, tmp_path / "out").returncode == 0
    assert mfptq.verify(tmp_path / "out", source).ok


@pytest.mark.case(107)
def test_the_owner_may_be_unknown(source: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out" / ".mfptq").mkdir(parents=True)
    with FileLock(tmp_path / "out" / ".mfptq" / "lock"), pytest.raises(DestinationLockedError, match="unknown"):
        mfptq.convert(source, tmp_path / "out")


@pytest.mark.case(110)
def test_a_worker_that_dies_ends_the_run(source: Path, tmp_path: Path, monkeypatch) -> None:
    from mfptq.execution.worker_memory import WorkerMemory

    def broken(*_args: object) -> None:
        raise ZeroDivisionError("a bug in a kernel")

    with monkeypatch.context() as patch:
        patch.setattr(WorkerMemory, "quantize", broken)
        with pytest.raises(ZeroDivisionError):
            mfptq.convert(source, tmp_path / "out", max_workers=3)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").rglob("*.partial"))
    mfptq.convert(source, tmp_path / "out")
    assert mfptq.verify(tmp_path / "out", source).ok


@pytest.mark.case(111)
def test_a_device_without_memory(source: Path, tmp_path: Path, monkeypatch) -> None:
    import torch

    from mfptq.execution.worker_memory import WorkerMemory

    def full(*_args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(WorkerMemory, "quantize", full)
        with pytest.raises(MemoryBudgetError) as caught:
            mfptq.convert(source, tmp_path / "out", max_workers=2)
    assert caught.value.exit_code == 8
    mfptq.convert(source, tmp_path / "out")
    assert mfptq.verify(tmp_path / "out", source).ok


def surroundings() -> Iterator[tuple[str, list[str], dict[str, str]]]:
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    yield "C locale, hash seed 0, -X dev", ["-X", "dev"], {**c_locale, "PYTHONHASHSEED": "0"}
    turkish = {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati"}
    yield "Turkish locale, time zone, hash seed 4242, -OO", ["-OO"], {**turkish, "PYTHONHASHSEED": "4242"}


@pytest.mark.parametrize(("flags", "environment"), [pytest.param(f, e, id=name) for name, f, e in surroundings()])
@pytest.mark.case(112)
def test_surroundings_do_not_change_a_byte(flags, environment, source, tmp_path) -> None:
    (source / "tokenizer.json").write_text('{"\u0131": "\u0130"}', encoding="utf-8")
    mfptq.convert(source, tmp_path / "expected", max_workers=2)
    line = [sys.executable, *flags, "-c", RUN, "convert", str(source), str(tmp_path / "out"), "-q"]
    done = subprocess.run(
        line, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


@pytest.mark.parametrize(
    "options", [{"max_workers": 1}, {"max_workers": 7}, {"max_workers": 2, "max_memory": "400MB"}], ids=str
)
@pytest.mark.case(112)
def test_threads_and_memory_do_not_change_a_byte(options, big: Path, converted: dict[str, str], tmp_path: Path) -> None:
    mfptq.convert(big, tmp_path / "out", **options)
    assert digests(tmp_path / "out") == converted


def limited(limit: int) -> Callable[[], None]:
    """Return what sets RLIMIT_DATA in a child."""
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def convert_limited(source: Path, out: Path, limit: int, *options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", RUN, "convert", str(source), str(out), *options]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, preexec_fn=limited(limit),
                          env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})  # fmt: skip


@pytest.mark.case(115, 116)
@pytest.mark.parametrize("limits", sampled([((112, 400),)], [((96, 104, 112, 120, 128, 160, 224, 400),)]))
def test_memory_that_the_system_refuses(limits: tuple[int, ...], source: Path, tmp_path: Path) -> None:
    codes = []
    for megabytes in limits:
        out = tmp_path / f"out{megabytes}"
        done = convert_limited(source, out, megabytes * 2**20, "--max-workers", "2")
        if "mfptq" not in done.stderr and done.returncode:
            continue  # the interpreter or a library could not even start
        codes.append(done.returncode)
        assert done.returncode in (0, 8), (megabytes, done.returncode, done.stderr)
        assert "Traceback" not in done.stderr, (megabytes, done.stderr)
        if done.returncode:
            assert not (out / "config.json").exists()
            mfptq.convert(source, out)
        assert mfptq.verify(out, source).ok
    assert codes[-1] == 0


@pytest.mark.case(113)
def test_a_tensor_far_larger_than_the_memory(tmp_path: Path) -> None:
    from mfptq.checkpoint.header import TensorSpec, encode_header

    (tmp_path / "source").mkdir()
    head, header = encode_header([TensorSpec("a.weight", "BF16", (16384, 8192)), TensorSpec("b", "U8", (2**28,))])
    shard = tmp_path / "source" / "model.safetensors"
    shard.write_bytes(head)
    os.truncate(shard, len(head) + header.data_bytes)
    (tmp_path / "source" / "config.json").write_text("{}")
    done = convert_limited(tmp_path / "source", tmp_path / "out", 240 * 2**20, "--max-memory", "200MB", "--json")
    assert done.returncode == 0, done.stderr
    assert int(re.findall(r'"peak_memory": (\d+)', done.stdout)[0]) <= 200e6
    shutil.rmtree(tmp_path / "out")


@pytest.mark.case(114)
def test_many_more_shards_need_hardly_more_memory(tmp_path: Path) -> None:
    peaks = []
    for shards in (12, 200):  # some for each worker, so that both use all their buffers
        folder = tmp_path / f"s{shards}"
        folder.mkdir()
        write_shards(folder, shards)
        done = command_apart("convert", folder, tmp_path / f"o{shards}", "--json", "--max-workers", "2")
        assert done.returncode == 0, done.stderr
        peaks.append(int(re.findall(r'"peak_memory": (\d+)', done.stdout)[0]))
    assert peaks[1] <= peaks[0] + 5 * 2**20, peaks  # a shard's plan is some kilobytes


def write_shards(folder: Path, shards: int) -> None:
    from mfptq.checkpoint.header import TensorSpec, encode_header

    for number in range(shards):
        specs = [TensorSpec(f"l{number}.{leaf}_proj.weight", "BF16", (512, 512)) for leaf in ("q", "k", "v", "o")]
        head, header = encode_header(specs)
        (folder / f"model-{number:05d}.safetensors").write_bytes(head + bytes(header.data_bytes))
    (folder / "config.json").write_text("{}")


def test_small_shapes_are_what_the_fixtures_say() -> None:
    assert SMALL.hidden == 64
