"""The instructions that multiply bfloat16 values by powers of two: a number is added to their bits, zeros apart.

Called by `decode.py` for a function that is not in the cache. One function: (values, shifts, rows, columns, distance from one
row's shifts to the next, result [1]). The result tells whether any value began or ended as no normal number: it is then at
least 0x7F00.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .vector import HALF, LONG, VOID, WORD, Code

LANES = 32
_MAGNITUDE, _LEAST_NORMAL = 0x7FFF, 0x0080


def emit(module: ir.Module, name: str) -> None:
    """Write the function."""
    pointer = HALF.as_pointer()
    function = ir.Function(module, ir.FunctionType(VOID, [pointer, pointer, LONG, LONG, LONG, pointer]), name)
    values, shifts, rows, columns, distance, result = function.args
    code = Code(function, LANES)
    single = code.one_lane()
    build = code.build
    wide, narrow = (code.variable(each.constant(HALF, 0)) for each in (code, single))
    whole = build.and_(columns, LONG(-LANES))
    with code.loop(LONG(0), rows, LONG(1)) as row:
        start, own = build.mul(row, columns), build.mul(row, distance)
        for lanes, held, span in ((code, wide, (LONG(0), whole)), (single, narrow, (whole, columns))):
            with lanes.loop(*span, LONG(lanes.lanes)) as column:
                place = lanes.at(values, build.add(start, column))
                _shift(lanes, place, lanes.at(shifts, build.add(own, column)), held)
    largest = narrow.get()
    for lane in range(LANES):
        largest = _larger(code, largest, build.extract_element(wide.get(), WORD(lane)))
    build.store(largest, result)
    build.ret_void()


def _shift(code: Code, place: Any, shift: Any, held: Any) -> None:
    """Shift the values at a place, and note the largest of what tells that they are normal numbers, before and after."""
    build, kind = code.build, code.typed(HALF)
    bits, by = code.load(place, kind, 2), code.load(shift, kind, 2)
    magnitude = build.and_(bits, code.constant(HALF, _MAGNITUDE))
    is_zero = build.icmp_unsigned("==", magnitude, code.constant(HALF, 0))
    least = code.constant(HALF, _LEAST_NORMAL)  # what is below wraps around, to more than the largest finite number
    found = _larger(code, build.sub(magnitude, least), build.sub(build.add(magnitude, by), least))
    held.set(_larger(code, held.get(), build.select(is_zero, code.constant(HALF, 0), found)))
    code.store(build.select(is_zero, bits, build.add(bits, by)), place, 2)


def _larger(code: Code, one: Any, other: Any) -> Any:
    return code.build.select(code.build.icmp_unsigned(">", one, other), one, other)
