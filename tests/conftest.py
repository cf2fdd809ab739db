"""One builder of valid checkpoints, and ways to run the command line as a user does."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

# One thread for BLAS and torch, here and in processes that tests start: on arrays this small, others only wait, and waiting
# in a loop costs more than all the rest. Must come before the first import of numpy.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import mfptq
from mfptq.demo import DemoShape, write_demo
from mfptq.execution import preview

SMALL = DemoShape(hidden=64, intermediate=64, layers=4, vocabulary=64)
SMALL_EXPERTS = DemoShape(hidden=64, intermediate=32, layers=4, experts=4, vocabulary=64)

CASES = Path(__file__).parents[1] / "docs" / "fault-model.md"
MARKED = pytest.StashKey[set[int]]()  # cases that tests of the default run are marked with
COLLECTED = pytest.StashKey[set[Path]]()  # files of all tests, the deselected ones too
pytest_plugins = ["pytester"]


def documented_cases() -> set[int]:
    """Return the numbers of the cases in the fault model: the first column of its tables."""
    return {int(number) for number in re.findall(r"^\| (\d+) \|", CASES.read_text(), re.MULTILINE)}


def pytest_configure(config: pytest.Config) -> None:
    """Describe the marker of cases; keep bytecode; look for no garbage while everything is imported."""
    config.addinivalue_line("markers", "case(*numbers): the cases of docs/fault-model.md that a test stands for")
    # Whatever the environment says: else each process that a test starts compiles the package anew.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Collect the cases that tests are marked with, before any test is deselected; refuse numbers that are no case."""
    known = documented_cases()
    marked = config.stash.setdefault(MARKED, set())
    config.stash.setdefault(COLLECTED, set()).update(item.path for item in items)
    for item in items:
        numbers = {number for mark in item.iter_markers("case") for number in mark.args}
        if unknown := numbers - known:
            raise pytest.UsageError(f"{item.nodeid}: case {min(unknown)} is not in {CASES.name}")
        if item.get_closest_marker("slow") is None:
            marked |= numbers


def pytest_collection_finish() -> None:
    """Leave all that was imported out of garbage collections: it stays, and there is a million of it."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def quick_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let estimates of a run's time try the kernel for a moment only."""
    monkeypatch.setattr(preview, "MEASURED_SECONDS", 0.01)


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Give signals that the test run ignores their default handling back: nohup and background jobs pass it on to children."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def sampled(often: Iterable[Any], rest: Iterable[Any]) -> list[Any]:
    """Return a test's parameters: those that every run tries, then those that only `-m slow` tries."""

    def parameter(values: Any, *marks: pytest.MarkDecorator) -> Any:
        return pytest.param(*(values if isinstance(values, tuple) else (values,)), marks=marks)

    return [*map(parameter, often), *(parameter(values, pytest.mark.slow) for values in rest)]


class Stopped(BaseException):
    """What `stopping_at` raises: no error, as Ctrl-C is none."""


def stopping_at(kind: type) -> Callable[[object], None]:
    """Return an `on_event` that stops a run at the first event of a kind."""

    def stop(event: object) -> None:
        if isinstance(event, kind):
            raise Stopped

    return stop


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what is made once, for fixtures that hand out copies: the sources."""
    folder = tmp_path_factory.mktemp("kept")
    write_demo(folder / "source", SMALL)
    write_demo(folder / "moe", SMALL_EXPERTS)
    return folder


@pytest.fixture(scope="session")
def kept_output(kept: Path) -> Path:
    """What a plain conversion makes of `source`."""
    mfptq.convert(kept / "source", kept / "out")
    return kept / "out"


@pytest.fixture
def source(kept: Path, tmp_path: Path) -> Path:
    """A small dense checkpoint whose fused partners lie in different shards."""
    return Path(shutil.copytree(kept / "source", tmp_path / "source"))


@pytest.fixture
def moe_source(kept: Path, tmp_path: Path) -> Path:
    """A small checkpoint with expert stacks."""
    return Path(shutil.copytree(kept / "moe", tmp_path / "moe"))


@pytest.fixture
def output(kept_output: Path, tmp_path: Path) -> Path:
    """What a plain conversion makes of `source`, for a test of its own."""
    return Path(shutil.copytree(kept_output, tmp_path / "out"))


@pytest.fixture
def expected(kept_output: Path) -> dict[str, str]:
    """The digests of what a plain conversion makes of `source`."""
    return digests(kept_output)


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `mfptq` as a user does, but in this process: a new one takes most of a second to import what it needs.

    Use `command_apart` where a process of its own matters: signals, memory, locks, the Hub's environment, closed streams.
    """
    from huggingface_hub import constants

    from mfptq.cli import main

    words, said, told = ["mfptq", *map(str, arguments)], io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(told):
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(constants, "HF_HUB_OFFLINE", environment.get("HF_HUB_OFFLINE") != "0")
        patch.setattr(sys, "argv", words)
        patch.setattr(main, "tune_interpreter", lambda: None)
        patch.setattr(main, "handle_signals", lambda: None)
        try:
            main.run()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return subprocess.CompletedProcess(words, code, said.getvalue(), told.getvalue())


def command_apart(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `mfptq` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from mfptq.cli.main import run; run()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        check=False,
    )
