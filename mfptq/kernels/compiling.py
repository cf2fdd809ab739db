"""From LLVM instructions to object code for this processor. Nothing here is imported where that is on disk already."""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import binding, ir


@cache
def has_fused() -> bool:
    """Return whether this processor has an instruction for x * y + z."""
    return bool(_features().get("fma")) or not binding.get_process_triple().startswith(("x86_64", "amd64", "i686"))


@cache
def host() -> str:
    """Return what LLVM knows of this processor."""
    return repr((binding.get_process_triple(), binding.get_host_cpu_name(), _features().flatten()))


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


def optimized(module: ir.Module, target: Any) -> Any:
    """Return a module as LLVM makes it fast, ready to be emitted."""
    parsed = binding.parse_assembly(str(module))
    builder = binding.create_pass_builder(target, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(parsed, builder)
    return parsed


def object_code(module: ir.Module) -> bytes:
    """Return a module as an object file for this processor."""
    return bytes(_target().emit_object(optimized(module, _target())))


@cache
def _engine() -> Any:
    return binding.create_mcjit_compiler(binding.parse_assembly(""), _target())


def load(code: bytes, name: str) -> int:
    """Return the address of a function of an object file, which LLVM puts into memory for good."""
    engine = _engine()
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return int(engine.get_function_address(name))
