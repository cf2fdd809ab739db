"""Show how far a command is: a bar on a terminal, and in logs of jobs a line at least every minute.

Called by the commands that take long. Bars and lines go to stderr; with `--quiet`, or where it is closed, there are none.
What it lends to a run is called often, and so also raises Interrupted in it once a signal has come.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from ..errors import printable
from ..execution.events import Advanced, Event, OnEvent, Planned, ShardFinished
from ..sizes import duration, transfer_text
from .process import deferred_signals

if TYPE_CHECKING:
    from ..output.publish import StoredFile

MINUTE = 60.0  # seconds between two lines in a log
Blocks = Callable[[int, int, str], object]  # blocks that are run, of all, and what else there is to say


@contextmanager
def progress(*, quiet: bool, what: str = "convert") -> Iterator[OnEvent]:
    """Lend a callback for the events of a run: it moves a bar in source bytes, or writes a line for each shard."""
    with _byte_progress(quiet=quiet, what=what) as show, deferred_signals() as check:
        yield lambda event: (check(), show(event))


@contextmanager
def _byte_progress(*, quiet: bool, what: str) -> Iterator[OnEvent]:
    if not _is_shown(quiet=quiet):
        yield lambda _event: None
        return
    if not sys.stderr.isatty():
        with _download_lines():
            yield ProgressLines(sys.stderr).show
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc=what, leave=False) as bar:

        def show(event: Event) -> None:
            match event:
                case Planned(total_bytes):
                    bar.reset(total_bytes)
                case Advanced(source_bytes):
                    bar.update(source_bytes)

        yield show


@contextmanager
def block_progress(what: str, *, quiet: bool) -> Iterator[Blocks]:
    """Lend a callback for a walk through a model, block by block, once it is downloaded: of that logs tell too."""
    with _block_progress(what, quiet=quiet) as show, deferred_signals() as check:
        yield lambda done, total, more: (check(), show(done, total, more))


@contextmanager
def _block_progress(what: str, *, quiet: bool) -> Iterator[Blocks]:
    if not _is_shown(quiet=quiet):
        yield lambda _done, _total, _more: None
        return
    if not sys.stderr.isatty():
        with _download_lines():
            yield BlockLines(sys.stderr, what).show
        return
    from tqdm import tqdm

    with tqdm(unit="block", desc=what, leave=False) as bar:

        def show(done: int, total: int, more: str) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.set_postfix_str(more, refresh=False)

        yield show


def _is_shown(*, quiet: bool) -> bool:
    """Return whether anybody is to see it; what turns off bars of huggingface_hub turns off those here too."""
    if quiet or sys.stderr is None:
        return False
    return not (sys.stderr.isatty() and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"))


@contextmanager
def _download_lines() -> Iterator[None]:
    """Let what is logged of downloads appear on stderr, for as long as the block lasts."""
    logger, handler = logging.getLogger("mfptq.hub.downloads"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("mfptq: %(message)s"))
    level, logger.propagate = logger.level, False
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True


class ProgressLines:
    """Progress for logs of jobs: a line for each finished shard, and one at least every MINUTE seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = self._last = time.monotonic()
        self._done = self._total = 0

    def show(self, event: Event) -> None:
        """Take an event, and write a line where one is due."""
        finished = ""
        match event:
            case Planned(total_bytes):
                self._total = total_bytes
            case Advanced(source_bytes):
                self._done += source_bytes
            case ShardFinished(name, resumed):
                finished = f"{printable(name)} {'was finished before' if resumed else 'finished'}: "
        now = time.monotonic()
        if finished or now - self._last >= MINUTE:
            self._last = now
            with suppress(OSError):
                self._stream.write(f"mfptq: {finished}{self._state(now - self._begun)}\n")
                self._stream.flush()

    def _state(self, seconds: float) -> str:
        done = min(
            self._done, self._total
        )  # scales of a quantized source are read beside its codes, some of them twice
        return transfer_text(done, self._total, self._done / max(seconds, 1e-9))


class UploadLines(ProgressLines):
    """Progress of a publication: a line for each file, and one at least every MINUTE seconds."""

    def show_upload(self, file: StoredFile | None, done: int, total: int) -> None:
        """Take what `push` tells of its progress."""
        self._done, self._total = done, total
        self.show(Advanced(0) if file is None else ShardFinished(file.name))


class BlockLines:
    """Progress of a walk through a model: a line every MINUTE seconds."""

    def __init__(self, stream: TextIO, what: str) -> None:
        self._stream, self._what = stream, what
        self._begun = self._last = time.monotonic()
        self._first: int | None = None  # blocks that an earlier run has done

    def show(self, done: int, total: int, more: str) -> None:
        """Take how many blocks are run, of how many, and write a line where one is due."""
        self._first = done if self._first is None else self._first
        now = time.monotonic()
        if now - self._last < MINUTE:
            return
        self._last = now
        seconds = (now - self._begun) / max(done - self._first, 1) * (total - done)
        left = f", about {duration(seconds)} left" if done > self._first else ""
        with suppress(OSError):
            self._stream.write(f"mfptq: {self._what}: {done} of {total} blocks{more and f', {more}'}{left}\n")
            self._stream.flush()
