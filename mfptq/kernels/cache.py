"""Keep compiled kernels on disk: made once for a machine and a version, whatever number of processes start at once.

Called by `compiling.py` and `cuda.py`. The folder is $MFPTQ_CACHE_DIR, or `mfptq` in the user's cache folder, or a private
one among the temporary files where homes are read-only; where there is none at all, kernels are compiled anew. What is loaded
runs as machine code: files of other users, or that others may write, are never taken, and a digest in front of each shows
whether it is whole.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

KEPT = 8  # of one name: other versions and machines that share a home
_DIGEST_BYTES = 32


def cached(name: str, key: bytes, make: Callable[[], bytes]) -> bytes:
    """Return what `make` makes of all that `key` tells: from disk, or made now and kept where there is a place for it."""
    file = f"{name}-{hashlib.sha256(key).hexdigest()[:32]}"
    for folder in _folders():
        found = _load(folder / file)
        if found is not None:
            return found
    made = make()
    for folder in _folders():
        with suppress(OSError):
            _keep(folder, file, made)
            _forget_old(folder, name)
            break
    return made


def _folders() -> Iterator[Path]:
    """Yield where kernels may lie, the best place first."""
    if "MFPTQ_CACHE_DIR" in os.environ:
        yield Path(os.environ["MFPTQ_CACHE_DIR"])
        return
    with suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mfptq"
    yield Path(tempfile.gettempdir()) / f"mfptq-{_user()}"


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _is_private(status: os.stat_result) -> bool:
    return status.st_uid == _user() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _load(path: Path) -> bytes | None:
    """Return a whole file that only this user can have written; None for anything else."""
    with suppress(OSError):
        if not _is_private(path.parent.stat()):
            return None
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(fd, "rb") as file:  # noqa: PTH123 - an open descriptor has no path
            status = os.fstat(fd)
            data = file.read() if stat.S_ISREG(status.st_mode) and _is_private(status) else b""
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        return content if hashlib.sha256(content).digest() == digest else None
    return None


def _keep(folder: Path, file: str, data: bytes) -> None:
    """Put a file under its name, whole or not at all; raises OSError where the folder cannot be ours."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_private(folder.stat()):
        raise PermissionError(folder)
    temporary = folder / f".{file}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as out:  # noqa: PTH123 - an open descriptor has no path
            out.write(hashlib.sha256(data).digest() + data)
        temporary.replace(folder / file)
    except BaseException:  # whatever ends this, no temporary stays
        with suppress(OSError):
            temporary.unlink()
        raise


def _forget_old(folder: Path, name: str) -> None:
    """Remove all but the newest few files of one name."""
    found = sorted(folder.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found[KEPT:]:
        path.unlink(missing_ok=True)
