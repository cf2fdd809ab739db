"""From LLVM instructions to functions of this processor: compiled once for a machine, then loaded from disk in milliseconds.

Object code is kept under what it was made from: the generating sources, LLVM's version, the processor and its features. A
function that is not there yet takes about a second, whoever starts at the same time.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llvmlite import binding

from .artifacts import artifact

if TYPE_CHECKING:
    from llvmlite import ir

LANES = 16
_lock = threading.RLock()


@cache
def has_fused() -> bool:
    """Return whether this processor has an instruction for x * y + z."""
    return bool(_features().get("fma")) or not binding.get_process_triple().startswith(("x86_64", "amd64", "i686"))


@cache
def _features() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.get_host_cpu_features()


@cache
def _target() -> Any:
    features = _features().flatten()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)


@cache
def origin() -> bytes:
    """Return what decides about every kernel beside its name: the generating sources and LLVM's version."""
    folder = Path(__file__).parent
    sources = [*sorted(folder.glob("*.py")), folder.parent / "nvfp4.py"]
    digest = hashlib.sha256(repr(binding.llvm_version_info).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.digest()


@cache
def _key() -> bytes:
    parts = (binding.get_process_triple(), binding.get_host_cpu_name(), _features().flatten())
    return origin() + repr(parts).encode()


def optimized(module: ir.Module, target: Any) -> Any:
    """Return a module as LLVM makes it fast, ready to be emitted."""
    parsed = binding.parse_assembly(str(module))
    builder = binding.create_pass_builder(target, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(parsed, builder)
    return parsed


@cache
def _engine() -> Any:
    return binding.create_mcjit_compiler(binding.parse_assembly(""), _target())


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
        engine = _engine()
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
        return self._type(engine.get_function_address(name))

    def _compile(self, name: str) -> bytes:
        from llvmlite import ir

        module = ir.Module(name)
        self._emit(module, name)
        return bytes(_target().emit_object(optimized(module, _target())))
