"""Keep what an evaluation has found so far, so that the same command goes on where an interrupted one stopped.

Called by `evaluation_pass`, and by `evaluate` when it is done. A folder beside the output's files holds, for the last block that all windows have gone through, the hidden
states of both models and the errors so far; and behind the last block a line for each window that is judged. What is torn, or of
another evaluation, counts as nothing. The folder goes when the evaluation is done.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.strict_json import StrictJsonError, parse_json
from ..errors import SourceError
from ..limits import MAX_INDEX_BYTES
from ..output.estimates import WindowSums
from ..storage.files import read_small, storage_errors

FOLDER = ".mfptq-evaluation"
SAVE_SECONDS = 30.0  # states of large models take a while to write: not behind every block of a small one
_STATES, _WINDOWS = "states.pt", "windows.jsonl"
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError)


@dataclass(slots=True)
class Progress:
    """What is known of each window so far: errors by block, sums of those judged, and what both models gave last."""

    windows: list[WindowSums] = field(default_factory=list)
    hidden: dict[str, list[float]] = field(default_factory=dict)
    given: list[tuple[Any, Any]] = field(default_factory=list)


class Unfinished:
    """The notes of one evaluation, told from others by `key`; with no `output`, nothing is noted."""

    def __init__(self, output: Path | None, key: Sequence[Any]) -> None:
        self._folder = output / FOLDER if output is not None else None
        self._key = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        self._saved = time.monotonic()

    def restore(self, device: str) -> Progress:
        """Return how far an earlier run came."""
        if self._folder is None or not self._folder.is_dir():
            return Progress()
        try:
            states = torch.load(self._folder / _STATES, map_location=device, weights_only=True)
            if states["key"] != self._key:
                return Progress()
            given = [(source, output) for source, output in states["given"]]
            return Progress(self._windows(), dict(states["hidden"]), given)
        except _UNREADABLE:
            return Progress()

    def block_done(self, progress: Progress, *, last: bool) -> None:
        """Note what both models gave behind a block, if the last note is old; behind the `last` one, where lines follow, at once."""
        if self._folder is None or (time.monotonic() - self._saved < SAVE_SECONDS and not last):
            return
        made = self._folder / f"{_STATES}.new"
        with storage_errors("write", made):
            self._folder.mkdir(exist_ok=True)
            (self._folder / _WINDOWS).unlink(missing_ok=True)
            states = {"key": self._key, "hidden": progress.hidden, "given": [list(both) for both in progress.given]}
            torch.save(states, made)
            made.replace(self._folder / _STATES)
        self._saved = time.monotonic()

    def window_done(self, sums: WindowSums) -> None:
        """Note a window that is judged."""
        if self._folder is not None:
            path = self._folder / _WINDOWS
            with storage_errors("write", path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(sums)) + "\n")

    def _windows(self) -> list[WindowSums]:
        """Return the windows that were judged; a line that is torn ends them."""
        assert self._folder is not None
        sums: list[WindowSums] = []
        with suppress(SourceError, StrictJsonError, TypeError):
            for line in read_small(self._folder / _WINDOWS, MAX_INDEX_BYTES).splitlines():
                sums.append(WindowSums(**parse_json(line)))  # noqa: PERF401 - what is before a torn line counts
        return sums


def discard_notes(output: Path) -> None:
    """Remove what was noted of an evaluation."""
    shutil.rmtree(output / FOLDER, ignore_errors=True)
