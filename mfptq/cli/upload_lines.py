"""Write the progress of a publication, as `ProgressLines` does that of a conversion. Called by `push` off a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..execution.events import Advanced, ShardFinished
from .text import ProgressLines

if TYPE_CHECKING:
    from ..output.publish import StoredFile


class UploadLines(ProgressLines):
    """Progress of a publication for logs: a line for each file, and one at least every MINUTE seconds."""

    def show_upload(self, file: StoredFile | None, done: int, total: int) -> None:
        """Take what `push` tells of its progress."""
        self._done, self._total = done, total
        self.show(Advanced(0) if file is None else ShardFinished(file.name))
