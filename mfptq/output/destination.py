"""Claim the output folder, and write into it so that it is complete or resumable, never mistaken for whole.

Protocol for each file: a unique temporary in `.mfptq/`, preallocated, written at positions, fsynced, renamed, the folder
fsynced, then a journal line. `config.json` comes last: without it no engine takes the folder for a checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from ..checkpoint.companions import CONFIG
from ..checkpoint.source import Source
from ..errors import (
    DestinationError,
    DestinationExistsError,
    DestinationLockedError,
    NonFiniteWeightError,
    PlanMismatchError,
    SmoothingError,
    SourceChangedError,
    counted,
    listed,
    quote,
)
from ..sizes import size_text
from ..storage.files import beneath, storage_errors, sync_folder
from ..storage.partial_file import PartialFile, partial_path
from .claim import JOURNAL, MANIFEST, REPORT, WORK, OutputClaim
from .journal import Journal, JournalState, Recorder, ShardResult, read_journal
from .leftovers import abandon, take_over
from .parts import joined, read_parts

SPACE_MARGIN = 16 * 2**20
_NO_RERUN_HELPS = (NonFiniteWeightError, SmoothingError, SourceChangedError)  # so nothing of such a run is kept


class Destination:
    """A claimed output folder: `done` holds the shards that an earlier run finished, checked by content."""

    def __init__(
        self, root: Path, journal: Recorder, done: Mapping[str, ShardResult], temporaries: Path | None = None
    ) -> None:
        self.root = root
        self.done = dict(done)
        self._journal = journal
        self._temporaries = temporaries or root / WORK
        self.before_shard: Callable[[], None] = lambda: None  # may wait until there is room for another
        self.has_room: Callable[[], bool] = lambda: True  # the same, for who cannot wait
        self.one_by_one = False  # there is room for one unfinished shard only

    def create(self, name: str, size: int) -> PartialFile:
        """Return a new temporary of `size` bytes that will become `name`."""
        if "/" in name:
            self._make_folder(name)
        return PartialFile(partial_path(self._temporaries, name), self.root / name, size)

    def _make_folder(self, name: str) -> None:
        """Make the sub-folder of a file, durably, and nowhere else."""
        folder = beneath(self.root, name).parent
        with storage_errors("create", folder):
            folder.mkdir(parents=True, exist_ok=True)
            for parent in (folder, *folder.parents[: name.count("/")]):
                sync_folder(parent)

    def write(self, name: str, data: bytes) -> str:
        """Write a small file, whole or not at all; return its SHA-256, hexadecimal."""
        with self._new(name, len(data)) as file:
            file.write(data, 0)
        return hashlib.sha256(data).hexdigest()

    def copy(self, name: str, source: Source) -> str:
        """Copy a companion file of the source, whole or not at all; return its SHA-256, hexadecimal.

        Raises SourceChangedError where that is not what the source's listing says.
        """
        with self._new(name, source.size(name)) as file:
            file.fill(partial(source.read_into, name))
            found = file.sha256()
            if source.sha256(name) not in (None, found):
                raise SourceChangedError(f"{quote(name)} is not what its digest on the Hub says: try again")
            return found

    @contextmanager
    def _new(self, name: str, size: int) -> Iterator[PartialFile]:
        """Lend a temporary that is committed when the block ends well, and discarded otherwise."""
        file = self.create(name, size)
        try:
            yield file
            file.commit()
        except BaseException:
            file.discard()
            raise

    def record(self, result: ShardResult) -> None:
        """Note a committed shard as finished."""
        self._journal.record(result)
        self.done[result.name] = result

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()


@contextmanager
def open_destination(
    root: Path,
    claim: OutputClaim,
    *,
    overwrite: bool = False,
    complete: bool = False,
    poll: Callable[[], object] | None = None,
) -> Iterator[Destination]:
    """Claim the output folder, resume what is unfinished in it, and keep every other run out until the end.

    `complete`: every shard must be there and intact. `poll` is called now and then while finished shards are checked; what
    it raises stops that.

    Raises DestinationExistsError, DestinationLockedError, PlanMismatchError or StorageError, before touching anything;
    DestinationError for shards that are missing.
    """
    existed = root.is_dir()
    found = examine(root, claim, overwrite=overwrite)
    if complete:
        _check_complete(root, claim, found.state.done)
    create_folders(root)
    with locked(root):
        done = take_over(root, claim, inspect_output(root, claim, overwrite=overwrite), poll)
        if complete:
            _check_complete(root, claim, done)
        journal = Journal(root / WORK / JOURNAL, JournalState(claim.digests, done, claim.files))
        try:
            yield Destination(root, journal, done)
        except _NO_RERUN_HELPS:
            journal.close()
            abandon(root, claim, existed=existed)
            raise
        except BaseException:
            journal.close()
            raise
        journal.close()
        shutil.rmtree(root / WORK, ignore_errors=True)


class Examined(NamedTuple):
    """An output folder before a run: what may be resumed, the bytes that are needed besides, and those that are free."""

    state: JournalState
    needed: int
    free: int


def examine(root: Path, claim: OutputClaim, *, overwrite: bool = False) -> Examined:
    """Return what a run would find in an output folder; touches nothing.

    Raises what `open_destination` raises, and DestinationError where a folder cannot be made or written to.
    """
    with storage_errors("read folder", root):
        check_apart(root, claim.source)
        state = inspect_output(root, claim, overwrite=overwrite)
        existing = next(path for path in (root, *root.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise DestinationError(f"output {quote(root)} cannot be made: {quote(existing)} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise DestinationError(
                f"output {quote(root)} cannot be made: {quote(existing)} may not be written to (Permission denied)"
            )
        needed, free = check_space(root, claim, state.done)
    return Examined(state, needed, free)


def create_folders(root: Path) -> None:
    """Make the folders, durably: what is renamed into them later must not lose its way after a power cut."""
    with storage_errors("create", root):
        new = [folder for folder in (root / WORK).absolute().parents if not folder.exists()]
        (root / WORK).mkdir(parents=True, exist_ok=True)
        for folder in dict.fromkeys([root.absolute().parent, root, *(folder.parent for folder in new)]):
            sync_folder(folder)


def check_apart(root: Path, source: Path | None) -> None:
    """Raise if the output is the source's folder, lies in it, or holds it."""
    if source is None:
        return
    real, origin = Path(os.path.realpath(root)), Path(os.path.realpath(source))
    for inner, outer, text in ((real, origin, "inside the source"), (origin, real, "a folder that holds the source")):
        for folder in (inner, *inner.parents):
            if folder == outer or (folder.exists() and outer.exists() and folder.samefile(outer)):
                what = "the source itself" if real == origin else text
                raise DestinationError(f"output {quote(root)} is {what}: choose another folder")


def inspect_output(root: Path, claim: OutputClaim, *, overwrite: bool) -> JournalState:
    """Return what may be resumed in `root`, or raise; touches nothing."""
    if not root.is_dir():
        if root.exists() or root.is_symlink():
            raise DestinationExistsError(f"output {quote(root)} exists and is not a folder")
        return JournalState()
    with storage_errors("read folder", root):
        names = set(os.listdir(root))  # noqa: PTH208 - names are data here
        has_journal = (root / WORK / JOURNAL).exists()
    written = read_journal(root / WORK / JOURNAL) if has_journal else JournalState()
    state = joined(written, read_parts(root / WORK, claim.shards))
    if not has_journal and state.digests is None:
        _check_finished(root, names, overwrite=overwrite)
        return JournalState()
    if state.digests is None or overwrite:
        return JournalState(files=state.files)
    parts = dict.fromkeys([*claim.digests, *state.digests])
    changed = [part for part in parts if claim.digests.get(part) != state.digests.get(part)]
    if changed:
        raise PlanMismatchError(
            f"output {quote(root)} holds an unfinished conversion with other {' and '.join(changed)}: "
            "rerun it as it was, choose another folder, or overwrite it to start anew"
        )
    return state


def _check_finished(root: Path, names: set[str], *, overwrite: bool) -> None:
    """Raise unless a folder without a journal is empty, was left by a run that had hardly begun, or may be overwritten."""
    ours = MANIFEST in names and (REPORT in names or WORK in names)
    if not ours and not names <= {WORK}:
        raise DestinationExistsError(f"output {quote(root)} is not empty and not ours: choose another folder")
    if ours and CONFIG in names and not overwrite:
        raise DestinationExistsError(f"output {quote(root)} holds a finished conversion: overwrite it to redo it")


def check_space(root: Path, claim: OutputClaim, done: Mapping[str, ShardResult]) -> tuple[int, int]:
    """Return the bytes that are needed for the shards that are not done, and those that are free; raise if they are too few."""
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    with storage_errors("read free space of", existing):
        status = os.statvfs(existing)
    free = status.f_bavail * status.f_frsize
    sizes = sorted((size for name, size in claim.shards.items() if name not in done), reverse=True)
    needed = sum(sizes[: claim.at_once]) + SPACE_MARGIN
    if free < needed:
        raise DestinationError(
            f"output {quote(root)} needs {size_text(needed)}, {size_text(free)} are free: make room or choose another disk"
        )
    return needed, free


def _check_complete(root: Path, claim: OutputClaim, done: Mapping[str, ShardResult]) -> None:
    missing = [name for name in claim.shards if name not in done]
    if missing:
        raise DestinationError(
            f"output {quote(root)} lacks {len(missing)} of {counted(len(claim.shards), 'shard', 'shards')}, or they are not "
            f"what was written: {listed(missing)}: run the parts that make them again, or convert without parts"
        )


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the folder's lock; where the file system has none, unique temporaries and equal bytes still protect it."""
    lock, owner = FileLock(root / WORK / "lock"), root / WORK / "pid"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        pid = "unknown"
        with suppress(OSError):
            pid = owner.read_text(errors="replace").strip()
        raise DestinationLockedError(
            f"output {quote(root)} is in use by pid {quote(pid)}: wait for it, or stop it"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError):
            with storage_errors("lock", root):
                raise
    try:
        with storage_errors("write", owner):
            owner.write_text(f"{os.getpid()}\n")
        yield
    finally:
        with suppress(OSError):
            lock.release(force=True)
