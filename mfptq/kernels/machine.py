"""Functions of this processor: compiled once for a machine, then loaded from disk in milliseconds, without LLVM.

Object code is kept under what it was made from: the generating sources, LLVM's version, the processor and its features. A
function that is not there yet takes about a second, whoever starts at the same time.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llvmlite

from .artifacts import artifact
from .linking import CannotLinkError, link

if TYPE_CHECKING:
    from llvmlite import ir

LANES = 16  # blocks, or rows, that one pass of a loop takes
CPUINFO = Path("/proc/cpuinfo")
_IDENTITY = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
_lock = threading.RLock()


@cache
def origin() -> bytes:
    """Return what decides about every kernel beside its name: the generating sources and LLVM's version."""
    folder = Path(__file__).parent
    sources = [*sorted(folder.glob("*.py")), folder.parent / "nvfp4.py"]
    digest = hashlib.sha256(llvmlite.__version__.encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.digest()


@cache
def _key() -> bytes:
    return origin() + (_processor() or _known_to_llvm()).encode()


def _processor() -> str | None:
    """Return what Linux tells of an x86-64 processor's make and features; None elsewhere."""
    if platform.machine() != "x86_64" or not CPUINFO.exists():
        return None
    first = CPUINFO.read_text().split("\n\n", maxsplit=1)[0]
    fields = dict(line.split(":", maxsplit=1) for line in first.splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in fields.items()}
    return repr([known.get(name) for name in _IDENTITY]) if known.get("flags") else None


def _known_to_llvm() -> str:
    from .compiling import host

    return host()


class MachineCode:
    """Functions by name, each compiled or loaded at its first use; `emit` writes one into a module. Safe for threads."""

    def __init__(self, emit: Callable[[ir.Module, str], None], arguments: Sequence[Any]) -> None:
        self._emit = emit
        self._type = ctypes.CFUNCTYPE(None, *arguments)
        self._functions: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        found = self._functions.get(name)
        if found is None:
            with _lock:
                found = self._functions.get(name) or self._load(name)
                self._functions[name] = found
        return found

    def _load(self, name: str) -> Any:
        code = artifact(name, name.encode() + _key(), lambda: self._compile(name))
        try:
            return self._type(link(code, name))
        except CannotLinkError:
            from .compiling import load

            return self._type(load(code, name))

    def _compile(self, name: str) -> bytes:
        from llvmlite import ir

        from .compiling import object_code

        module = ir.Module(name)
        self._emit(module, name)
        return object_code(module)
