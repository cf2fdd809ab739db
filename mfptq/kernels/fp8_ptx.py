"""Write the GPU's functions for FP8, and those that decode codes: the arithmetic of `fp8_code.py` and `decode_code.py`.

Called by `ptx.py`. A thread quantizes a whole segment, sixteen values at a time, so that sums come out as on a CPU; and it decodes
single values, each thread the next one.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from ..fp8 import LANES
from .decode_code import PREFIX, decoded
from .fp8_code import Segment, Values, element
from .ptx_threads import GLOBAL, kernel, larger, store_over_warps, thread_numbers
from .stats import ERROR_FIELDS, WORST
from .vector import BYTE, DOUBLE, FLOAT, HALF, LONG, Code


def emit_fp8(module: ir.Module, name: str) -> None:
    """Write fp8_BF16, fp8_exact_BF16, ...: with the arguments of `fp8_code.emit`, but stats [7, warps]."""
    dtype, exact = name.rpartition("_")[2], "exact" in name
    pointers = [each.as_pointer(GLOBAL) for each in (element(dtype), BYTE, DOUBLE, LONG, FLOAT, FLOAT)]
    code = kernel(module, name, [*pointers, LONG], LANES)
    source, codes, stats, starts, scales, others, count = code.function.args
    values, build = Values(code, source, dtype, exact=exact), code.build
    joins = [larger(code) if place == WORST else build.fadd for place in range(ERROR_FIELDS)]
    held = [code.variable(DOUBLE(0.0)) for _ in range(ERROR_FIELDS)]
    with _share(code, count) as number:
        found = Segment.at(values, starts, number).quantize((scales, others), number, codes)
        added = {0: found.error, 1: found.norm, 2: found.error, WORST: found.share, 4: found.zeroed, 6: found.empty}
        for place, value in added.items():
            held[place].set(joins[place](held[place].get(), value))
    for place in range(ERROR_FIELDS):
        store_over_warps(code, (stats, place), held[place].get(), joins[place])
    build.ret_void()


def emit_decode(module: ir.Module, name: str) -> None:
    """Write decode_<codes>: (codes, scales, values in bfloat16, how many, columns of a row, columns that share a scale)."""
    pointers = [each.as_pointer(GLOBAL) for each in (BYTE, FLOAT, HALF)]
    code = kernel(module, name, [*pointers, LONG, LONG, LONG])
    source, scales, values, count, columns, run = code.function.args
    build = code.build
    runs = build.udiv(build.sub(build.add(columns, run), LONG(1)), run)
    with _share(code, count) as index:
        row, column = build.udiv(index, columns), build.urem(index, columns)
        place = build.add(build.mul(row, runs), build.udiv(column, run))
        factor = code.spread(code.load(code.at(scales, place), FLOAT, 4))
        bits = decoded(code, source, index, (name.removeprefix(PREFIX), factor))
        code.store(bits, code.at(values, index), 2)
    build.ret_void()


def _share(code: Code, count: Any) -> Any:
    """Return the loop over a thread's own share of so many things."""
    number, step = thread_numbers(code)
    return code.loop(number, count, step)
