"""Deal with what earlier runs left in an output folder: keep finished shards that are intact, remove the rest.

Called by `output.destination` while it holds the folder's lock, and by `output.part_destination`, which takes none. Removes
nothing but files that mfptq itself writes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..checkpoint.companions import CONFIG
from ..errors import SourceError, UnsafePathError
from ..limits import MAX_INDEX_BYTES
from ..storage.digest import file_sha256
from ..storage.files import beneath, open_regular, read_small, storage_errors, sync_folder
from ..storage.parallel import Stopped, in_parallel
from ..storage.partial_file import PARTIAL_SUFFIX
from .claim import MANIFEST, WORK, OutputClaim
from .journal import JournalState, ShardResult
from .parts import PARTS


def take_over(
    root: Path, claim: OutputClaim, state: JournalState, poll: Callable[[], object] | None
) -> dict[str, ShardResult]:
    """Remove what earlier runs left and is not to be kept; return the finished shards that are what they should be."""
    remove_stale(root / WORK)
    _remove_files(root, [CONFIG])
    if state.digests is None:
        names = [*state.files, *_listed(root), *claim.files]
        _remove_files(root, [name for name in names if name != MANIFEST])
        _remove_files(root, [MANIFEST])  # last: it says that the other files are ours
        shutil.rmtree(root / WORK / PARTS, ignore_errors=True)
        return {}
    return intact(root, claim, state.done, poll)


def intact(
    root: Path, claim: OutputClaim, done: Mapping[str, ShardResult], poll: Callable[[], object] | None
) -> dict[str, ShardResult]:
    """Return those of the finished shards that still have the content that was noted."""
    whole = in_parallel(partial(_is_intact, root, claim), done.values(), poll)
    return {name: result for (name, result), kept in zip(done.items(), whole, strict=True) if kept}


def remove_stale(folder: Path, *, alone: bool = True) -> None:
    """Remove temporaries of processes that have ended; `alone`: no other run of this process may be writing any."""
    for path in folder.glob(f"*{PARTIAL_SUFFIX}"):
        pid = path.name.split(".")[-3]
        own = pid == str(os.getpid())
        if (own and alone) or not pid.isdigit() or not _is_alive(int(pid)):
            with suppress(OSError):
                path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OverflowError:
        return False
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _listed(root: Path) -> list[str]:
    """Return the names in the manifest of an earlier output of ours."""
    try:
        lines = read_small(root / MANIFEST, MAX_INDEX_BYTES).decode(errors="replace").splitlines()
    except SourceError:
        return []
    return [line[66:] for line in lines]


def _remove_files(root: Path, names: Iterable[str]) -> None:
    """Remove files, durably, before anything else happens."""
    for name in names:
        with storage_errors("remove", root / name), suppress(UnsafePathError, FileNotFoundError):
            path = beneath(root, name)
            path.unlink()
            if "/" in name:
                with suppress(OSError):  # a folder of other files stays
                    path.parent.rmdir()
    with storage_errors("sync", root):
        sync_folder(root)


def _is_intact(root: Path, claim: OutputClaim, stopped: Stopped, result: ShardResult) -> bool:
    """Return whether a finished shard still has the content that the journal says."""
    if claim.shards.get(result.name) != result.size:
        return False
    if claim.uploaded.get(result.name) == result.sha256:
        return True
    try:
        fd = open_regular(root / result.name)
    except SourceError:
        return False
    with storage_errors("read", root / result.name):
        try:
            return os.fstat(fd).st_size == result.size and file_sha256(fd, result.size, stopped) == result.sha256
        except EOFError:
            return False
        finally:
            os.close(fd)


def abandon(root: Path, claim: OutputClaim, *, existed: bool) -> None:
    """Remove everything of a run that no rerun can finish, the folder too unless it `existed` before."""
    _remove_files(root, claim.files)
    shutil.rmtree(root / WORK, ignore_errors=True)
    if not existed:
        with suppress(OSError):
            root.rmdir()
