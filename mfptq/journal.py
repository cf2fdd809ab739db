"""What is finished, on disk: one checksummed line for each shard, after a line that names the plan.

A line that is torn, flipped or foreign is as good as absent: its shard is done again, with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .files import open_regular, read_exact, storage_errors, sync_folder, write_all
from .strict_json import StrictJsonError, parse_json

CHECK_LENGTH = 16


@dataclass(frozen=True, slots=True)
class ShardResult:
    """A finished output shard: its SHA-256 (hexadecimal), size in bytes, and error statistics by kind of module."""

    name: str
    sha256: str
    size: int
    kinds: Mapping[str, Mapping[str, float]]


def _line(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:CHECK_LENGTH]} {text}\n".encode()


def _value(line: bytes) -> Any:
    """Return what a line says, or None if it is not whole."""
    check, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or hashlib.sha256(text[:-1]).hexdigest()[:CHECK_LENGTH].encode() != check:
        return None
    try:
        return parse_json(text, infinity=True)
    except StrictJsonError:
        return None


@dataclass(frozen=True, slots=True)
class JournalState:
    """What a journal on disk says: the digests of its plan, or None if it has no whole first line."""

    digests: Mapping[str, str] | None
    done: Mapping[str, ShardResult]


def read_journal(path: Path, limit: int = 2**28) -> JournalState:
    """Return the state of a journal; whatever is damaged in it counts as not written."""
    with storage_errors("read", path):
        fd = open_regular(path)
        try:
            data = bytearray(min(os.fstat(fd).st_size, limit))
            read_exact(fd, memoryview(data), 0)
        finally:
            os.close(fd)
    values = [_value(line) for line in bytes(data).splitlines(keepends=True)]
    if not values or not isinstance(values[0], dict) or "plan" not in values[0]:
        return JournalState(None, {})
    results = (ShardResult(**value["shard"]) for value in values[1:] if isinstance(value, dict) and "shard" in value)
    return JournalState(values[0]["plan"], {result.name: result for result in results})


class Journal:
    """An open journal; every line is durable when the call that wrote it returns."""

    def __init__(self, path: Path, digests: Mapping[str, str], done: Mapping[str, ShardResult]) -> None:
        """Replace the journal at `path`, whole or not at all, by one that says `done`."""
        self._path = path
        lines = [_line({"plan": dict(digests)}), *(_line({"shard": asdict(result)}) for result in done.values())]
        fresh = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
        self._end = 0
        with storage_errors("write", path):
            self._fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._append(b"".join(lines))
            os.replace(fresh, path)  # noqa: PTH105 - every system call goes through `os`
            sync_folder(path.parent)

    def record(self, result: ShardResult) -> None:
        """Write that a shard is finished."""
        with storage_errors("write", self._path):
            self._append(_line({"shard": asdict(result)}))

    def _append(self, data: bytes) -> None:
        write_all(self._fd, data, self._end)
        os.fsync(self._fd)
        self._end += len(data)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
