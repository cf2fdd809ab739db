"""Fit text to the columns of the terminal.

Called by the modules that render text. Prints nothing.
"""

from __future__ import annotations

import shutil
import textwrap

NARROWEST, WIDEST = 40, 110


def width() -> int:
    """Return the columns of the terminal, within what can be read."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((80, 24)).columns))


def wrapped(text: str, columns: int, indent: str = "  ") -> list[str]:
    """Return a text in lines of at most that many columns, cut at spaces only."""
    return textwrap.wrap(text, columns, subsequent_indent=indent, break_on_hyphens=False)
