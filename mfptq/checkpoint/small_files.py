"""Read the small files of a source whole: JSON objects, and whatever is looked at before it is copied.

Called by `folder`, `index`, and whoever reads a config or a report. Nothing larger than its limit is read.
"""

from __future__ import annotations

from typing import Any

from ..errors import SourceError, quote
from .source import Source
from .strict_json import StrictJsonError, parse_json

POINTER_BYTES = 1024  # more than any git-lfs pointer has
_POINTER = b"version https://git-lfs.github.com/spec/"


def read_file(source: Source, name: str, limit: int) -> bytes:
    """Return a whole small file of the source; refuses, before reading, one of more than `limit` bytes."""
    size = source.size(name)
    if size > limit:
        raise SourceError(f"{quote(name)} is {size} bytes, expected at most {limit}")
    data = bytearray(size)
    source.read_into(name, 0, memoryview(data))
    return bytes(data)


def read_object(source: Source, name: str, limit: int) -> dict[str, Any]:
    """Return the JSON object in a file of the source; Infinity and NaN are taken as configs hold them."""
    raw = read_file(source, name, limit)
    refuse_pointer(name, raw)
    try:
        value = parse_json(raw, infinity=True)
    except StrictJsonError as error:
        raise SourceError(f"{quote(name)}: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{quote(name)} is not a JSON object")
    return value


def refuse_pointer(name: str, data: bytes) -> None:
    """Raise SourceError if what should be a file is a git-lfs pointer to it."""
    if data.startswith(_POINTER):
        raise SourceError(f"{quote(name)} is a git-lfs pointer, not the file itself: run `git lfs pull` in the source")
