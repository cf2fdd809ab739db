"""Tell the driver how far a task is, by a small file beside what the task makes.

Called by `cluster.tasks` to write and by `cluster.calibrating` to read. What is told must never stop the work, and may be found
half written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..observation.calibration_pass import CalibrationProgress

WRITE_SECONDS = 1.0


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.progress")


def progress_note(path: Path) -> Callable[[CalibrationProgress], None]:
    """Return what writes the progress of the task that makes `path`, once a second and at the end."""
    latest = 0.0

    def write(event: CalibrationProgress) -> None:
        nonlocal latest
        if time.monotonic() > latest + WRITE_SECONDS or event.samples == event.requested:
            latest = time.monotonic()
            with suppress(OSError):
                told = (event.samples, event.requested, event.steps, event.total_steps)
                _note(path).write_text(" ".join(map(str, told)), encoding="ascii")

    return write


def told(path: Path) -> list[int] | None:
    """Return what the task that makes `path` has written last: samples, all of its samples, steps, all of its steps."""
    try:
        found = _note(path).read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return [int(each) for each in found] if len(found) == 4 and all(map(str.isdigit, found)) else None
