"""Note on disk which shards are finished: one checksummed line for each, after a line that names the plan.

A line that is torn, flipped or foreign is as good as absent: its shard is done again, with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from ..checkpoint.strict_json import StrictJsonError, parse_json
from ..storage.files import open_regular, storage_errors, sync_folder, write_all

CHECK_LENGTH = 16
MAX_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class ShardResult:
    """A finished output shard: its SHA-256 (hexadecimal), size in bytes, and error statistics by kind of module."""

    name: str
    sha256: str
    size: int
    kinds: Mapping[str, Mapping[str, float]]


_TYPES = {"name": str, "sha256": str, "size": int, "kinds": dict}


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
    """What a journal says: its plan's digests, None without a whole first line; finished shards; all planned files."""

    digests: Mapping[str, str] | None = None
    done: Mapping[str, ShardResult] = field(default_factory=dict)
    files: tuple[str, ...] = ()


def read_journal(path: Path, limit: int = MAX_BYTES) -> JournalState:
    """Return the state of a journal; whatever is damaged in it counts as not written."""
    with storage_errors("read", path):
        fd = open_regular(path)
        try:
            data = os.pread(fd, min(os.fstat(fd).st_size, limit), 0)
        finally:
            os.close(fd)
    return parse_journal(data)


def parse_journal(data: bytes) -> JournalState:
    """Return what the bytes of a journal say, for any bytes."""
    values = [_value(line) for line in data.splitlines(keepends=True)]
    first = values[0] if values else None
    if not isinstance(first, dict) or not isinstance(first.get("plan"), dict):
        return JournalState()
    results = [result for value in values[1:] if (result := _result(value)) is not None]
    files = first.get("files")
    names = tuple(name for name in files if isinstance(name, str)) if isinstance(files, list) else ()
    return JournalState(first["plan"], {result.name: result for result in results}, names)


def _result(value: Any) -> ShardResult | None:
    """Return the shard that a line names, or None for lines of other kinds and of other versions."""
    shard = value.get("shard") if isinstance(value, dict) else None
    if not isinstance(shard, dict) or shard.keys() != _TYPES.keys():
        return None
    return ShardResult(**shard) if all(type(shard[key]) is kind for key, kind in _TYPES.items()) else None


class Recorder(Protocol):
    """Notes finished shards durably, for several threads."""

    def record(self, result: ShardResult) -> None:
        """Write that a shard is finished."""

    def close(self) -> None:
        """Close what is open."""


class Journal:
    """An open journal, for several threads; every line is durable when the call that wrote it returns."""

    def __init__(self, path: Path, state: JournalState, temporaries: Path | None = None) -> None:
        """Replace the journal at `path`, whole or not at all, by one that says `state`.

        `temporaries` is the folder, by default its own, where it lies until it is whole.
        """
        self._path = path
        first = {"plan": dict(state.digests or {}), "files": list(state.files)}
        lines = [_line(first), *(_line({"shard": asdict(result)}) for result in state.done.values())]
        fresh = (temporaries or path.parent) / f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial"
        self._end = 0
        self._lock = Lock()
        with storage_errors("write", path):
            self._fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                self._append(b"".join(lines))
                os.replace(fresh, path)  # noqa: PTH105 - every system call goes through `os`
                sync_folder(path.parent)
            except BaseException:
                with suppress(OSError):
                    self.close()
                with suppress(OSError):
                    os.unlink(fresh)  # noqa: PTH108
                raise

    def record(self, result: ShardResult) -> None:
        """Write that a shard is finished."""
        with storage_errors("write", self._path):
            self._append(_line({"shard": asdict(result)}))

    def _append(self, data: bytes) -> None:
        with self._lock:
            write_all(self._fd, data, self._end)
            os.fsync(self._fd)
            self._end += len(data)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
