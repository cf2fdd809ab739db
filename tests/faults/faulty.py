"""The operating system's file calls below some folders: counted, traced, failed at the Nth, cut short, or the last.

`FaultyFiles` replaces functions of `os` while it is entered, so that everything that writes is caught: our own code,
pathlib, shutil and filelock. `cut_power` rebuilds, from a trace, folders that a power cut may leave.
"""

# ruff: noqa: PTH100, PTH120 - paths are text here, as the system takes them
from __future__ import annotations

import errno
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KILLED = frozenset({"open", "pwrite", "fsync", "replace", "unlink", "posix_fallocate", "ftruncate", "mkdir", "rmdir"})
WATCHED = KILLED | {"pread", "preadv", "listdir", "statvfs", "fstat", "close"}

Real = Callable[..., Any]
Fault = Callable[[str, Real, tuple[Any, ...], dict[str, Any]], Any]


def fail(code: int) -> Fault:
    """Return a fault: the call fails with an errno."""

    def fault(_name: str, _real: Real, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        raise OSError(code, os.strerror(code))

    return fault


def exhaust(_name: str, _real: Real, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    """Fault: there is no memory left."""
    raise MemoryError


def kill(_name: str, _real: Real, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    """Fault: the process dies before the call."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_the_middle(name: str, real: Real, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Fault: a write is done by half, any other call whole, then the process dies."""
    short(name, real, args, kwargs)
    os.kill(os.getpid(), signal.SIGKILL)


def short(name: str, real: Real, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Fault: a read or write does half of what was asked."""
    if name == "pwrite":
        fd, data, offset = args
        return real(fd, data[: (len(data) + 1) // 2], offset)
    if name == "preadv":
        fd, [buffer], offset = args
        return real(fd, [buffer[: (len(buffer) + 1) // 2]], offset)
    return real(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Event:
    """One call that changed something: `node` names a file through renames, `place` is a path, `data` what was written."""

    kind: str
    node: int = -1
    place: str = ""
    other: str = ""
    offset: int = 0
    data: bytes = b""


@dataclass
class FaultyFiles:
    """While entered, calls in `calls` on files below `roots` are counted; those that `at` chooses meet the fault."""

    roots: tuple[Path, ...]
    calls: frozenset[str] = KILLED
    at: Callable[[int], bool] = field(default=lambda _number: False)
    fault: Fault = kill
    tracing: bool = False
    counted: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._prefixes = tuple(str(root.absolute()) for root in self.roots)
        self._names: dict[int, str] = {}
        self._nodes: dict[str, int] = {}
        self._open_nodes: dict[int, int] = {}
        self._lock = threading.RLock()
        self._real: dict[str, Real] = {}

    def __enter__(self) -> FaultyFiles:
        for name in WATCHED:
            self._real[name] = getattr(os, name)
            setattr(os, name, self._wrapped(name, self._real[name]))
        return self

    def __exit__(self, *_error: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def _wrapped(self, name: str, real: Real) -> Real:
        def call(*args: Any, **kwargs: Any) -> Any:
            place = self._place(name, args, kwargs)
            if place is None:
                return real(*args, **kwargs)
            with self._lock:
                if name in self.calls:
                    self.counted.append(name)
                hit = name in self.calls and self.at(len(self.counted))
                existed = name == "open" and self.tracing and os.path.lexists(place)
                result = self.fault(name, real, args, kwargs) if hit else real(*args, **kwargs)
                self._note(name, place, args, result, existed=existed)
                return result

        return call

    def _place(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Return the path that a call is about, if it is below the roots."""
        subject = args[0]
        if isinstance(subject, int):
            return self._names.get(subject)
        path = os.fspath(subject)
        if not isinstance(path, str):
            return None
        folder = kwargs.get("dir_fd")
        if folder is not None:
            path = f"{self._names.get(folder, '/outside')}/{path}"
        path = os.path.abspath(path)
        inside = any(path == prefix or path.startswith(prefix + "/") for prefix in self._prefixes)
        return path if inside else None

    def _note(self, name: str, place: str, args: tuple[Any, ...], result: Any, *, existed: bool) -> None:
        if name == "open":
            self._names[result] = place
            if self.tracing and args[1] & os.O_CREAT and not existed:
                self._nodes[place] = len(self.events)
                self.events.append(Event("create", len(self.events), place))
            self._open_nodes[result] = self._nodes.get(place, -1)
        elif name == "close":
            self._names.pop(args[0], None)
            self._open_nodes.pop(args[0], None)
        elif self.tracing:
            self._trace(name, place, args, result)

    def _trace(self, name: str, place: str, args: tuple[Any, ...], result: Any) -> None:
        node = self._open_nodes.get(args[0], -1)
        if name == "pwrite":
            self.events.append(Event("write", node, offset=args[2], data=bytes(memoryview(args[1])[:result])))
        elif name in ("ftruncate", "posix_fallocate"):
            self.events.append(Event("size", node, offset=args[-1] if name == "ftruncate" else args[1] + args[2]))
        elif name == "fsync":
            folder = Path(place).is_dir()
            self.events.append(Event("syncdir", place=place) if folder else Event("sync", node))
        elif name == "replace":
            other = os.path.abspath(os.fspath(args[1]))
            self._nodes[other] = self._nodes.pop(place, -1)
            self.events.append(Event("rename", self._nodes[other], place, other))
        elif name in ("unlink", "mkdir", "rmdir"):
            self.events.append(Event(name, place=place))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A folder's files and folders before a trace began: all of it durable."""

    files: Mapping[str, bytes]
    folders: frozenset[str]


def snapshot(root: Path) -> Snapshot:
    """Return what lies below `root`, by absolute path."""
    paths = [root, *root.rglob("*")] if root.exists() else []
    files = {str(path): path.read_bytes() for path in paths if path.is_file()}
    return Snapshot(files, frozenset(str(path) for path in paths if path.is_dir()))


def cut_power(before: Snapshot, events: list[Event], chance: random.Random, keep: float) -> Snapshot:
    """Return a state that a power cut right after `events` may leave: what was synced, and any part of the rest.

    Each unsynced change is kept with probability `keep`, a kept write is torn half of the time, and the order among
    them does not matter. A rename between folders may leave the old name too.
    """
    files = {place: bytearray(data) for place, data in before.files.items()}
    nodes: dict[int, bytearray] = {}
    folders = set(before.folders)
    durable = _durable(events)
    for number, event in enumerate(events):
        if event.kind in ("write", "size"):
            if number in durable or chance.random() < keep:
                _change(nodes.setdefault(event.node, bytearray()), event, chance, torn=number not in durable)
            continue
        _move(files, folders, (event, number, nodes), lambda part: part in durable or chance.random() < keep)
    inside = [place for place in files if _reachable(place, folders)]
    return Snapshot({place: bytes(files[place]) for place in inside}, frozenset(_whole(folders)))


def _durable(events: list[Event]) -> set[int | tuple[int, str]]:
    """Return the events (and, for renames, which of their two sides) that a later sync has made durable."""
    found: set[int | tuple[int, str]] = set()
    synced_nodes: set[int] = set()
    synced_folders: set[str] = set()
    for number, event in reversed(list(enumerate(events))):
        if event.kind == "sync":
            synced_nodes.add(event.node)
        elif event.kind == "syncdir":
            synced_folders.add(event.place)
        elif event.kind in ("write", "size"):
            found |= {number} if event.node in synced_nodes else set()
        elif event.kind == "rename":
            sides = {"from": event.place, "to": event.other}
            found |= {(number, side) for side, place in sides.items() if os.path.dirname(place) in synced_folders}
        elif os.path.dirname(event.place) in synced_folders:
            found.add(number)
    return found


def _change(data: bytearray, event: Event, chance: random.Random, *, torn: bool) -> None:
    if event.kind == "size":
        del data[event.offset :]
        data.extend(bytes(event.offset - len(data)))
        return
    part = event.data
    start = 0
    if torn and part and chance.random() < 0.5:
        start = chance.randrange(len(part)) if chance.random() < 0.5 else 0
        part = part[start : chance.randrange(start, len(part) + 1)]
    end = event.offset + start + len(part)
    data.extend(bytes(max(0, end - len(data))))
    data[event.offset + start : end] = part


def _move(
    files: dict[str, bytearray],
    folders: set[str],
    change: tuple[Event, int, dict[int, bytearray]],
    kept: Callable[[int | tuple[int, str]], bool],
) -> None:
    event, number, nodes = change
    content = nodes.setdefault(event.node, bytearray()) if event.node >= 0 else bytearray()
    if event.kind == "create" and kept(number):
        files[event.place] = content
    elif event.kind == "rename":
        to = kept((number, "to"))
        if to:
            files[event.other] = content
        same = os.path.dirname(event.place) == os.path.dirname(event.other)
        if (to if same else kept((number, "from"))) and files.get(event.place) is content:
            del files[event.place]
    elif event.kind == "unlink" and kept(number):
        files.pop(event.place, None)
    elif event.kind == "mkdir" and kept(number):
        folders.add(event.place)
    elif event.kind == "rmdir" and kept(number):
        folders.discard(event.place)


def _whole(folders: Iterable[str]) -> Iterator[str]:
    known = set(folders)
    yield from (folder for folder in known if _reachable(folder, known) or os.path.dirname(folder) not in known)


def _reachable(place: str, folders: set[str]) -> bool:
    """Return whether every folder above a path, up to the topmost that is known, exists."""
    top = min(folders, key=len, default="")
    parent = os.path.dirname(place)
    while parent != top and len(parent) > len(top):
        if parent not in folders:
            return False
        parent = os.path.dirname(parent)
    return bool(top) and parent == top and place.startswith(top)


def restore(state: Snapshot, old: Path, new: Path) -> None:
    """Write a state of the folder `old` as the folder `new`."""
    for folder in sorted(state.folders, key=len):
        (new / Path(folder).relative_to(old)).mkdir(parents=True, exist_ok=True)
    for place, data in state.files.items():
        (new / Path(place).relative_to(old)).write_bytes(data)


ERRNOS = {
    "open": (errno.EMFILE, errno.ENFILE, errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EIO),
    "pwrite": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    "preadv": (errno.EIO, errno.ESTALE),
    "pread": (errno.EIO,),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "replace": (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES),
    "unlink": (errno.EIO, errno.EROFS, errno.EACCES),
    "posix_fallocate": (errno.ENOSPC, errno.EOPNOTSUPP, errno.EFBIG, errno.EIO),
    "ftruncate": (errno.EIO, errno.EFBIG, errno.ENOSPC),
    "mkdir": (errno.ENOSPC, errno.EROFS, errno.EACCES),
    "rmdir": (errno.EIO,),
    "listdir": (errno.EIO, errno.EMFILE),
    "statvfs": (errno.EIO,),
}
