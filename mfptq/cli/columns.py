"""Fit text to the columns of the terminal.

Called by the commands, and by the modules that render text. Prints nothing.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable

NARROWEST, WIDEST = 40, 110


def width() -> int:
    """Return the columns of the terminal, within what can be read."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((80, 24)).columns))


def wrapped(text: str, columns: int, indent: str = "  ") -> list[str]:
    """Return a text in lines of at most that many columns, cut at spaces, a name only where it is longer than a line."""
    if max(map(len, text.split()), default=0) > columns - len(indent):
        indent = "  "
    return textwrap.wrap(text, columns, subsequent_indent=indent, break_on_hyphens=False)


def fitting(lines: Iterable[str], columns: int) -> list[str]:
    """Return lines as they stand where they fit, so that the gaps of a table stay, else wrapped."""
    return [part for line in lines for part in ([line] if len(line) <= columns else wrapped(line, columns, "    "))]


def fitted(text: str) -> str:
    """Return lines that fit the terminal; as they are where there is none and COLUMNS is not set, for programs that read lines."""
    if shutil.get_terminal_size((0, 0)).columns == 0:
        return text
    return "\n".join(fitting(text.split("\n"), width()))
