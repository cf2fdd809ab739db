"""Note finished shards of parts, which several machines make of one output: one small file for each shard.

Called by `output.part_destination`, which writes them, and `output.destination`, which reads them. No lock is needed: every
file has a name of its own until it is whole, a rename gives it its place, and a second attempt replaces it by the same.

`.mfptq/parts/plan` says which plan the parts are of, `.mfptq/parts/done/<shard>` what became of a shard. Both have the
format of a journal, so what is torn or of another plan counts as not written.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import SourceError
from ..storage.files import storage_errors, sync_folder
from .journal import Journal, JournalState, ShardResult, read_journal

PARTS = "parts"
MACHINE_LENGTH = 12


def machine() -> str:
    """Return a name for what process ids are unique in: this boot of this machine, this namespace of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 - every system call goes through `os`
    except OSError:  # no Linux
        boot, space = f"{uuid.getnode():x}", 0
    return hashlib.sha256(f"{boot} {space}".encode()).hexdigest()[:MACHINE_LENGTH]


class PartRecords:
    """The records of one output's parts; `work` is the output's folder `.mfptq`. Safe to use from several threads."""

    def __init__(self, work: Path, digests: Mapping[str, str], files: Iterable[str]) -> None:
        self.temporaries = work / PARTS / machine()
        self._folder = work / PARTS
        self._digests = dict(digests)
        self._files = tuple(files)

    def begin(self) -> None:
        """Make the folders, and say what plan the parts are of unless that is said already."""
        with storage_errors("create", self._folder):
            for folder in (self._folder / "done", self.temporaries):
                folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self._folder.parent)
        if _read(self._folder / "plan").digests is None:
            Journal(self._folder / "plan", JournalState(self._digests, {}, self._files), self.temporaries).close()
        with storage_errors("sync", self._folder):
            sync_folder(self._folder)

    def record(self, result: ShardResult) -> None:
        """Note a shard, which is durable under its name, as finished."""
        path = self._folder / "done" / _file_name(result.name)
        Journal(path, JournalState(self._digests, {result.name: result}), self.temporaries).close()

    def close(self) -> None:
        """Do nothing: no file stays open."""


def read_parts(work: Path, shards: Iterable[str]) -> JournalState:
    """Return which plan the parts in the folder `work` are of, and which of its shards have been made."""
    begun = _read(work / PARTS / "plan")
    if begun.digests is None:
        return JournalState()
    done: dict[str, ShardResult] = {}
    for name in shards:
        record = _read(work / PARTS / "done" / _file_name(name))
        if record.digests == begun.digests and name in record.done:
            done[name] = record.done[name]
    return JournalState(begun.digests, done, begun.files)


def joined(journal: JournalState, parts: JournalState) -> JournalState:
    """Return what a journal and the records of parts say together; the journal is right where their plans differ."""
    if parts.digests is None or journal.digests not in (None, parts.digests):
        return journal
    return JournalState(parts.digests, {**parts.done, **journal.done}, journal.files or parts.files)


def _file_name(shard: str) -> str:
    """Return the record's file name: that of the shard, which may lie in a folder of the output."""
    return shard.replace("/", "|")


def _read(path: Path) -> JournalState:
    """Return what a record says; one that is absent, or no file, says nothing."""
    try:
        return read_journal(path)
    except SourceError:
        return JournalState()
