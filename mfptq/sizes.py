"""Read and write sizes in bytes, and times, as people do.

Called wherever a size comes from a user, and where either goes into a message. Decimal units, as drives and the Hub count.
"""

from __future__ import annotations

import math
import re

from .errors import UsageError, quote

_PREFIXES = " KMGT"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Return bytes from a number or a text like 4GB, 4G or 512MiB (decimal and binary units), or raise UsageError."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"size {quote(text)} is not understood: write it as 500MB, 4G or 1GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _PREFIXES.index((match[2] or " ").upper()))


def size_text(size: int, *, up: bool = False) -> str:
    """Return bytes in decimal units, with three digits; `up` rounds up, for what is a minimum."""
    unit, factor = next((pair for pair in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)) if size >= pair[1]), ("B", 1))
    value = size / factor
    digits = 0 if factor == 1 or value >= 100 else 1 if value >= 10 else 2
    if up:
        value = math.ceil(value * 10**digits) / 10**digits
    return f"{value:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def transfer_text(done: int, total: int, rate: float) -> str:
    """Return how far a transfer is, at `rate` bytes a second, and how long the rest takes."""
    left = f", about {duration((total - done) / rate)} left" if rate > 0 and 0 < done < total else ""
    return f"{size_text(done)} of {size_text(total)}, {size_text(int(rate))}/s{left}"
