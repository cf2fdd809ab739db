"""Conversions by the thousand: processes forked from one that has everything loaded, on a file system in memory."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import mfptq
from mfptq.demo import DemoShape, write_demo
from mfptq.errors import MfptqError
from tests.conftest import digests

TINY = DemoShape(hidden=16, intermediate=16, layers=4, vocabulary=16)
LARGER = DemoShape(hidden=128, intermediate=128, layers=1, vocabulary=128)
TINY_EXPERTS = DemoShape(hidden=16, intermediate=16, layers=4, experts=2, vocabulary=16)
ESCAPED = 99  # the exit code of a child that raised anything but an error of ours
CHILD_SECONDS = 60


@dataclass
class Tally:
    """What a campaign tried, by kind, and every attempt after which a guarantee did not hold."""

    tried: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def check(self, held: object, what: str) -> None:
        """Note a broken guarantee unless `held`."""
        if not held:
            self.broken.append(what)

    def as_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps({"tried": self.tried, "broken": self.broken, "notes": self.notes})


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint and the options it is converted with."""

    name: str
    shape: DemoShape
    shards: int
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    companions: int = 0

    def write(self, folder: Path) -> None:
        """Write the checkpoint."""
        write_demo(folder, self.shape, self.shards)
        if self.shards == 1:
            (folder / "model.safetensors.index.json").unlink()
            (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
        for number in range(self.companions):
            (folder / f"vocabulary{number}.txt").write_bytes(b"word\n" * 1000 * number)


LAYOUTS = (
    Layout("three shards", TINY, 3),
    Layout("one file, no index", TINY, 1),
    Layout("experts, two workers", TINY_EXPERTS, 2, {"max_workers": 2}),
    Layout("five shards, minmax", TINY, 5, {"method": "minmax"}),
    Layout("many companions", TINY, 2, {}, 6),
    Layout("larger tensors, three workers", LARGER, 2, {"max_workers": 3}),
)

IN_PARTS = Layout("three shards in two parts", TINY, 3, {"in_parts": 2})
OTHER = Layout("another checkpoint", TINY, 4, {}, 3)


def run(source: Path, out: Path, **options: Any) -> None:
    """Convert with one worker unless told otherwise; with `in_parts` as so many parts, and finish."""
    count, overwrite = options.pop("in_parts", 0), options.get("overwrite", False)
    if not count or overwrite:
        mfptq.convert(source, out, **{"max_workers": 1, **options})
        return
    options.pop("overwrite", None)
    with mfptq.plan(source, **options) as plan:
        for number in range(1, count + 1):
            plan.run_part(out, f"{number}/{count}", max_workers=1)
        plan.finish(out)


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (negative for a signal) and what it had to say."""

    code: int
    text: str


def child(work: Callable[[], object], log: Path) -> Ended:
    """Do some work in a forked process; codes are those of the command line, ESCAPED for any other exception."""
    pid = os.fork()
    if pid == 0:
        _work(work, log)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    text = log.read_text() if code not in (0, -signal.SIGKILL) and log.exists() else ""
    return Ended(code, text)


def here(work: Callable[[], object]) -> Ended:
    """Do some work in this process; codes are those of the command line, ESCAPED for any other exception."""
    try:
        work()
    except MfptqError as error:
        return Ended(error.exit_code, f"{type(error).__name__}: {error}")
    except Exception:
        return Ended(ESCAPED, traceback.format_exc())
    return Ended(0, "")


def _work(work: Callable[[], object], log: Path) -> None:
    code = ESCAPED
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(CHILD_SECONDS)
        threading.excepthook = lambda args: log.write_text(f"thread died: {args.exc_value!r}")
        work()
        code = 0
    except MfptqError as error:
        code = error.exit_code
        log.write_text(f"{type(error).__name__}: {error}")
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(code)


class Workplace:
    """A scratch folder with one source, the output that an undisturbed run gives, and numbered outputs."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self.source = folder / "source"
        layout.write(self.source)
        self.source_digests = digests(self.source)
        run(self.source, folder / "expected", **layout.options)
        self.expected = digests(folder / "expected")
        self._numbers = itertools.count()

    @cached_property
    def other(self) -> Path:
        """Another source, written when it is first asked for."""
        OTHER.write(self.folder / "other")
        return self.folder / "other"

    @cached_property
    def other_expected(self) -> dict[str, str]:
        """The output of the other source."""
        run(self.other, self.folder / "other expected", **self.layout.options)
        return digests(self.folder / "other expected")

    def convert(self, out: Path, **options: Any) -> None:
        """Convert the source."""
        run(options.pop("source", self.source), out, **{**self.layout.options, **options})

    def new(self) -> Path:
        """Return a new empty folder; outputs go below it, so that the output's own entry can be lost too."""
        path = self.folder / f"w{next(self._numbers)}"
        path.mkdir()
        return path

    def log(self) -> Path:
        """Return where children write what went wrong."""
        return self.folder / "log"

    def check_rerun(self, tally: Tally, place: Path, what: str, **options: Any) -> None:
        """Check G2 as things lie, then that a rerun gives the undisturbed bytes, and leave nothing behind."""
        out = place / "out"
        if (out / "config.json").exists():
            whole = {name: digest for name, digest in digests(out).items() if not name.startswith(".mfptq/")}
            tally.check(
                whole == self.expected or whole == self.other_expected,
                f"{what}: config.json stands in an output that is not whole",
            )
        ended = here(lambda: self.convert(out, **options))
        finished = ended.code == 5 and "finished conversion" in ended.text
        tally.check(ended.code == 0 or finished, f"{what}: the rerun ended with {ended.code}: {ended.text}")
        if finished:
            shutil.rmtree(out / ".mfptq", ignore_errors=True)
        tally.check(digests(out) == self.expected, f"{what}: other bytes after the rerun")
        shutil.rmtree(place)

    def check_source(self, tally: Tally) -> None:
        """Check that nothing has touched the source."""
        tally.check(digests(self.source) == self.source_digests, f"{self.layout.name}: the source was touched")


@cache
def workplace(layout: Layout) -> Workplace:
    """Return this process's workplace for a layout: in memory, if the system has such a place, and gone with the process."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Workplace(folder, layout)


def say(text: str) -> None:
    """Tell how far a long campaign is."""
    print(text, file=sys.stderr, flush=True)
