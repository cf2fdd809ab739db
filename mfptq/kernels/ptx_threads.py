"""The threads of a GPU in the kernels' language: a kernel's function, which thread this is, and sums over a warp.

Called by `ptx.py` and `fp8_ptx.py`. Nothing here knows what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from .vector import DOUBLE, LONG, VOID, WORD, Code

WARP = 32
GLOBAL = 1  # address space


def kernel(module: ir.Module, name: str, arguments: list[ir.Type], lanes: int = 1) -> Code:
    """Return where the instructions of a kernel go, whose values have so many lanes in each thread."""
    function = ir.Function(module, ir.FunctionType(VOID, arguments), name)
    function.calling_convention = "ptx_kernel"
    for argument in function.args:
        if isinstance(argument.type, ir.PointerType):
            argument.add_attribute("noalias")
            argument.attributes.align = 16  # so that what lies side by side is loaded at once
    return Code(function, lanes)


def register(code: Code, name: str) -> Any:
    """Return a thread's own register, a word."""
    return code.intrinsic(f"llvm.nvvm.read.ptx.sreg.{name}", WORD, [])


def thread_numbers(code: Code) -> tuple[Any, Any]:
    """Return (this thread's number in the grid, how many there are), as longs."""
    build, size = code.build, register(code, "ntid.x")
    number = build.add(build.mul(register(code, "ctaid.x"), size), register(code, "tid.x"))
    return build.zext(number, LONG), build.zext(build.mul(register(code, "nctaid.x"), size), LONG)


def store_over_warps(code: Code, place: tuple[Any, int], value: Any, join: Callable[[Any, Any], Any]) -> None:
    """Join each thread's number, float64, over its warp, and write it to a row of statistics `[rows, warps]`."""
    build, (stats, row) = code.build, place
    warp, warps = (build.udiv(count, LONG(WARP)) for count in thread_numbers(code))
    code.store(over_warp(code, value, join), code.at(stats, build.add(build.mul(warps, LONG(row)), warp)), 8)


def larger(code: Code) -> Callable[[Any, Any], Any]:
    """Return what joins two float64 numbers to the larger one."""
    return lambda a, b: code.build.select(code.build.fcmp_ordered(">", a, b), a, b)


def over_warp(code: Code, value: Any, join: Callable[[Any, Any], Any]) -> Any:
    """Return the values of a warp's threads joined, in every thread; the order does not depend on the GPU."""
    build = code.build
    for distance in (16, 8, 4, 2, 1):
        if value.type == WORD:
            value = join(value, _from_neighbour(code, value, distance))
            continue
        bits = build.bitcast(value, LONG)
        low = _from_neighbour(code, build.trunc(bits, WORD), distance)
        high = _from_neighbour(code, build.trunc(build.lshr(bits, LONG(32)), WORD), distance)
        other = build.or_(build.zext(low, LONG), build.shl(build.zext(high, LONG), LONG(32)))
        value = join(value, build.bitcast(other, DOUBLE))
    return value


def _from_neighbour(code: Code, word: Any, distance: int) -> Any:
    """Return the word of the thread whose number in the warp differs in one bit."""
    everyone, last = WORD(0xFFFFFFFF), WORD(WARP - 1)
    return code.intrinsic("llvm.nvvm.shfl.sync.bfly.i32", WORD, [everyone, word, WORD(distance), last])
