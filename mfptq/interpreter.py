"""What a process of our own asks of Python: a library must not, since these settings hold for the whole process."""

from __future__ import annotations

import atexit
import gc
import os
import sys

OBJECTS_BETWEEN_COLLECTIONS = 1_000_000  # a plan is a million small objects that stay: to look at them again is in vain
LONGEST_TURN = 1e-4  # seconds; who waits for the interpreter's lock has work for a whole core


def tune_interpreter() -> None:
    """Set up garbage collection, turns of threads, and numpy's linear algebra, whose threads would wait in a loop."""
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    atexit.register(gc.freeze)  # or Python looks at every object once more before it ends, for 20 ms
    sys.setswitchinterval(LONGEST_TURN)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
