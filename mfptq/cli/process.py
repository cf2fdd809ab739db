"""What a process of our own asks of Python: a library must not, since these settings hold for the whole process."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

OBJECTS_BETWEEN_COLLECTIONS = 1_000_000  # a plan is a million small objects that stay: to look at them again is in vain
LONGEST_TURN = 1e-4  # seconds; who waits for the interpreter's lock has work for a whole core
STOPPED = "stopped; rerun the same command to resume"
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class Interrupted(BaseException):
    """A signal asked the run to stop; no handler of errors must catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = _EXIT_CODES[signal.Signals(number)]


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Let a signal that asks the process to stop raise Interrupted, and a second one end it at once, as one does afterwards."""
    _handle(_raise_interrupted)
    try:
        yield
        _handle(signal.SIG_DFL)
    except RuntimeError as error:
        if isinstance(error.__cause__, Interrupted):  # Python 3.11 wraps what is raised while a class is made
            raise error.__cause__ from None
        raise


def _handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in _EXIT_CODES:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and background jobs stay what they are
            signal.signal(number, handler)


def _raise_interrupted(number: int, _frame: FrameType | None) -> None:
    _handle(_stop_at_once)
    raise Interrupted(number)


def _stop_at_once(number: int, _frame: FrameType | None) -> None:
    """End the process without tidying up: whoever signals twice does not want to wait, and a rerun resumes from anything."""
    with suppress(OSError):
        os.write(2, f"mfptq: error: {STOPPED}\n".encode())
    os._exit(_EXIT_CODES[signal.Signals(number)])


def tune_interpreter() -> None:
    """Set up garbage collection, turns of threads, and numpy's linear algebra, whose threads would wait in a loop."""
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    atexit.register(gc.freeze)  # or Python looks at every object once more before it ends, for 20 ms
    sys.setswitchinterval(LONGEST_TURN)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
