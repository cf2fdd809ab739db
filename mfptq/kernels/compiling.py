"""Make functions for this processor: from LLVM instructions to object code, from there, or from the cache, into memory.

Called by `cpu.py`, `fp8.py`, `decode.py` and `transposing.py`; the `*_code.py` write the instructions. Compiling a function
takes about a second, loading one from the cache milliseconds. Nothing here may let LLVM relax the arithmetic: no fast-math flag, no contraction.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numpy.typing as npt
from llvmlite import binding, ir

from .cache import cached

LONG = ctypes.c_int64
_lock = threading.RLock()  # LLVM's engine is not safe for threads


class Array:
    """An argument that is an array: the function is given the address of its first element."""

    @staticmethod
    def from_param(array: npt.NDArray[Any]) -> ctypes.c_void_p:
        """Return the address, for ctypes."""
        return ctypes.c_void_p(array.ctypes.data)


def _origin() -> bytes:
    """Return what decides about every kernel beside its name: the generating sources, llvmlite's and LLVM's versions."""
    folder = Path(__file__).parent
    digest = hashlib.sha256(f"llvmlite {llvmlite.__version__}, LLVM {binding.llvm_version_info}".encode())
    beside = [folder.parent / name for name in ("nvfp4.py", "fp8.py", "dtypes.py", "encodings/codes.py")]
    for path in [*sorted(folder.glob("*.py")), *beside]:
        digest.update(path.read_bytes())
    return digest.digest()


ORIGIN = _origin()  # read at once: an upgrade while a process runs must not mix its code with that of the next version


@cache
def _host() -> bytes:
    """Return what LLVM knows of this processor: machines that share a home must not share code."""
    return repr((binding.get_process_triple(), binding.get_host_cpu_name(), _features().flatten())).encode()


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
def _engine() -> Any:
    return binding.create_mcjit_compiler(binding.parse_assembly(""), _target())


def optimized(module: ir.Module, target: Any) -> Any:
    """Return a module as LLVM makes it fast, ready to be emitted."""
    parsed = binding.parse_assembly(str(module))
    builder = binding.create_pass_builder(target, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(parsed, builder)
    return parsed


class CpuFunctions:
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
        """Return a function whose code LLVM has put into memory for good: the engine lives as long as the process.

        The engine knows functions by their names: no two of a process may have one name.
        """
        code = cached(name, name.encode() + ORIGIN + _host(), lambda: self._compile(name))
        engine = _engine()
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
        return self._type(engine.get_function_address(name))

    def _compile(self, name: str) -> bytes:
        module = ir.Module(name)
        self._emit(module, name)
        return bytes(_target().emit_object(optimized(module, _target())))
