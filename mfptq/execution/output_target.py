"""Say where an output goes: a folder, and a Hub repo if it is published. Data, and what cannot be had together.

Made by `conversion` and `cli.convert`, for `execution.whole_run` and `execution.preview`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from ..output.publish import PushTarget


@dataclass(frozen=True, slots=True)
class Target:
    """Where an output goes: a folder, which `overwrite` clears of an older one, and a repo where `push_to` names one.

    `discard` removes from the folder what the repo has.
    """

    root: Path
    overwrite: bool = False
    push_to: PushTarget | None = None
    discard: bool = False

    def check(self) -> None:
        """Raise UsageError for what cannot be had together."""
        if self.discard and self.push_to is None:
            raise UsageError("discard_output is true, but nothing is pushed to a repo: the output would be lost")
