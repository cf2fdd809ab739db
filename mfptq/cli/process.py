"""Process-wide settings of the command line: garbage collection, thread switching, signals. The library never applies them."""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

OBJECTS_BETWEEN_COLLECTIONS = 1_000_000  # a plan is a million small objects that stay: to look at them again is in vain
LONGEST_TURN = 1e-4  # seconds; who waits for the interpreter's lock has work for a whole core
M_ARENA_MAX = -8  # of glibc's mallopt
LOG_LEVELS = ("debug", "info", "warning", "error")
STOPPED = "stopped; rerun the same command to resume"
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class Interrupted(BaseException):
    """A signal asked the run to stop; no handler of errors must catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = _EXIT_CODES[signal.Signals(number)]


class _Request:
    """The signal that asked for a stop while a run deferred it. No handler raises: it could strike inside `with lock:`."""

    deferred = False
    number = 0


def handle_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP end the process with one line and their exit code.

    At once, since nothing is half done: except inside `deferred_signals`, where the first one is noted for the run to see.
    """
    for number in _EXIT_CODES:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and background jobs stay what they are
            signal.signal(number, _on_signal)


def _on_signal(number: int, _frame: FrameType | None) -> None:
    if _Request.deferred and not _Request.number:
        _Request.number = number
        return
    with suppress(OSError):  # whoever signals twice does not want to wait, and a rerun resumes from anything
        os.write(2, f"mfptq: error: {STOPPED}\n".encode())
    os._exit(_EXIT_CODES[signal.Signals(number)])


@contextmanager
def deferred_signals() -> Iterator[Callable[[], None]]:
    """Let the block tidy up before a signal ends the process: lend a function that raises Interrupted once one has come."""

    def check() -> None:
        if _Request.number:
            raise Interrupted(_Request.number)

    _Request.deferred = True
    try:
        yield check
    finally:
        _Request.deferred = False


def set_up_logging(level: str) -> None:
    """Show the package's messages of a level and above on stderr, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mfptq: %(levelname)s: %(message)s"))
    logger = logging.getLogger("mfptq")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())


def tune_interpreter() -> None:
    """Set up garbage collection, turns of threads, and numpy's linear algebra, whose threads would wait in a loop."""
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    atexit.register(gc.freeze)  # or Python looks at every object once more before it ends, for 20 ms
    sys.setswitchinterval(LONGEST_TURN)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with suppress(AttributeError, OSError):  # glibc: or each thread that fetches keeps half a megabyte for itself
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
