"""Judge an answer by its status and headers: does it hold exactly the bytes that were asked for, may another try help, how long to wait.

`ranges` calls it for each answer, whoever received it, before a byte of the body is taken.
"""

from __future__ import annotations

import re
import time
from typing import Protocol

from ..errors import HubError, SourceChangedError, quote
from .file_digests import HubFile

PASSING = {408, 425, 429, 500, 502, 503, 504}
MOVED = {401, 403, 404, 410}  # what a signed address says when its time is over
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_RATE_LIMIT = re.compile(r"\bt=(\d+)")


class Headers(Protocol):
    """Headers by name, of any case, as huggingface_hub's client and `http.client` have them."""

    def get(self, name: str, default: str, /) -> str:
        """Return a header's value."""
        ...


class TransientError(Exception):
    """A failure that another try may not meet; `wait` in seconds, where the server named one."""

    def __init__(self, text: str, wait: float | None = None) -> None:
        super().__init__(text)
        self.wait = wait


def check_status(status: int, headers: Headers, file: HubFile) -> None:
    """Raise TransientError for a status that passes, and SourceChangedError if the file is shorter than its listing says."""
    if status in PASSING:
        raise TransientError(f"HTTP status {status}", requested_wait(headers))
    if status == 416:
        raise SourceChangedError(f"{quote(file.name)} is shorter on the Hub than its listing says")


def check_place(status: int, headers: Headers, file: HubFile, place: tuple[int, int]) -> None:
    """Raise unless the body of an answer is bytes (start, size) of the file that the listing names, or fewer of them."""
    start, size = place
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if status == 206 and found is not None:
        first, last, total = map(int, found.groups())
        if total != file.size:
            raise SourceChangedError(f"{quote(file.name)} has {total} bytes on the Hub, its listing says {file.size}")
        right = (first, last) == (start, start + size - 1)
    else:
        right = status == 200 and size == file.size and _length(headers) in (None, size)
    if not right or headers.get("Content-Encoding", "identity") != "identity":
        raise HubError(
            f"{quote(file.name)}: the server does not answer byte ranges as asked for; download the repo whole instead"
        )
    if (_length(headers) or 0) > size:
        raise too_long(file)


def too_long(file: HubFile) -> SourceChangedError:
    """Return the error of a body that does not end where the range does."""
    return SourceChangedError(f"{quote(file.name)}: the Hub sent more bytes than asked for")


def etag(headers: Headers) -> str:
    """Return an answer's ETag without its quotes and the mark of a weak one."""
    return headers.get("ETag", "").removeprefix("W/").strip('"')


def requested_wait(headers: Headers) -> float | None:
    """Return how many seconds a server asks to wait, or None if it does not say."""
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    if text:
        from email.utils import parsedate_to_datetime  # takes 9 ms, and servers that name a date are rare

        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            return None
    found = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    return float(found[1]) if found else None


def _length(headers: Headers) -> int | None:
    text = headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None
