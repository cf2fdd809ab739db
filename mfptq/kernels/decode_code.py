"""The instructions that decode codes and scales to bfloat16 or float32: one function for each format of codes.

Called by `decode.py` for a function that is not in the cache, and by `fp8_ptx.py`. A function's arguments: (codes, scales,
values, rows, columns, run). Each run of columns in a row has one scale. It goes through its codes once, from the first to the
last, and reads each vector of them before it writes: so codes may lie in the last bytes of the memory that values go to.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from ..encodings.codes import CODE_FORMATS, E2M1, E4M3, INT8, NAN_BITS
from .cpu_code import LANES
from .decode import WIDE
from .vector import BYTE, FLOAT, HALF, LONG, VOID, WORD, Code, Floats, Words

_SIGN = 0x80000000
_E2M1_HALVES = 0xC8643210  # nibble c is twice the value of the magnitude with code c
_INFINITY = 0x7F800000
PREFIX = "decode_"


def emit(module: ir.Module, name: str) -> None:
    """Write the function `decode_<codes>`: decode_E4M3, decode_E2M1, ...; decode_E2M1_F32 writes float32."""
    codes, element = name.removeprefix(PREFIX).removesuffix(WIDE), FLOAT if name.endswith(WIDE) else HALF
    one = _emit_run(module, codes, element)
    pointers = [BYTE.as_pointer(), FLOAT.as_pointer(), element.as_pointer()]
    function = ir.Function(module, ir.FunctionType(VOID, [*pointers, LONG, LONG, LONG]), name)
    source, scales, values, rows, columns, run = function.args
    code = Code(function, 1)
    build, scale_number = code.build, code.variable(LONG(0))
    with code.loop(LONG(0), rows, LONG(1)) as row:
        start = build.mul(row, columns)
        with code.loop(LONG(0), columns, run) as column:
            left = build.sub(columns, column)
            count = build.select(build.icmp_signed("<", left, run), left, run)
            scale = code.load(code.at(scales, scale_number.get()), FLOAT, 4)
            scale_number.set(build.add(scale_number.get(), LONG(1)))
            build.call(one, [source, scale, values, build.add(start, column), count])
    build.ret_void()


def _emit_run(module: ir.Module, codes: str, element: ir.Type) -> ir.Function:
    """Write a function for the values of one run: (codes, scale, values, index of the first one, how many)."""
    arguments = [BYTE.as_pointer(), FLOAT, element.as_pointer(), LONG, LONG]
    function = ir.Function(module, ir.FunctionType(VOID, arguments), f"decode_{codes}_run")
    function.linkage = "internal"
    source, scale, values, first, count = function.args
    code = Code(function, LANES)
    end = code.build.add(first, count)
    whole = code.build.add(first, code.build.and_(count, LONG(-LANES)))
    for lanes, begin, stop in ((code, first, whole), (code.one_lane(), whole, end)):
        factor = lanes.spread(scale)
        with lanes.loop(begin, stop, LONG(lanes.lanes)) as index:
            if element == HALF:
                lanes.store(decoded(lanes, source, index, (codes, factor)), lanes.at(values, index), 2)
            else:
                lanes.store(_scaled(lanes, source, index, (codes, factor)).raw, lanes.at(values, index), 4)
    code.build.ret_void()
    return function


def decoded(code: Code, source: Any, index: Any, form: tuple[str, Floats]) -> Any:
    """Return the bfloat16 bits of the codes from an index on; `form` is the codes' format, and their scale."""
    return code.build.trunc(_rounded(_scaled(code, source, index, form)).raw, code.typed(HALF))


def _scaled(code: Code, source: Any, index: Any, form: tuple[str, Floats]) -> Floats:
    codes, factor = form
    return _value(_load(code, source, index, codes), codes) * factor


def _load(code: Code, source: Any, index: Any, codes: str) -> Words:
    """Return the codes from an index on, one in each lane."""
    build = code.build
    if CODE_FORMATS[codes].bits == 8:
        return Words(code, build.zext(code.load(code.at(source, index), code.typed(BYTE)), code.typed(WORD)))
    place = code.at(source, build.lshr(index, LONG(1)))
    if code.lanes == 1:
        shift = build.shl(build.trunc(build.and_(index, LONG(1)), WORD), WORD(2))
        return Words(code, build.lshr(build.zext(code.load(place, BYTE), WORD), shift)) & 15
    pairs = code.load(place, ir.VectorType(BYTE, code.lanes // 2))  # a run begins at a whole byte
    twice = code.shuffle(pairs, pairs, [lane // 2 for lane in range(code.lanes)])
    shifts = ir.Constant(code.typed(WORD), [4 * (lane % 2) for lane in range(code.lanes)])
    return Words(code, build.lshr(build.zext(twice, code.typed(WORD)), shifts)) & 15


def _value(found: Words, codes: str) -> Floats:
    """Return the numbers that codes stand for."""
    if codes == E4M3:
        return _e4m3(found)
    if codes == E2M1:
        halves = _shifted(found.code.words(_E2M1_HALVES), (found & 7) << 2) & 15
        return _signed((_number(halves) * 0.5), (found & 8) << 28)
    offset = 2 ** (CODE_FORMATS[codes].bits - 1)
    biased = (found + offset) & (2 * offset - 1) if codes == INT8 else found
    return _number(biased - offset)


def _e4m3(found: Words) -> Floats:
    """Return E4M3 numbers: a float32's bits moved into place, its subnormals as a difference of two normal numbers."""
    magnitude = (found & 0x7F) << 20
    normal = (magnitude + (120 << 23)).floats()
    subnormal = (magnitude + (121 << 23)).floats() - 2.0**-6
    value = magnitude.equals(0x7F << 20).choose(found.code.words(NAN_BITS << 16).floats(), normal)
    small = magnitude.minimum(7 << 20).equals(magnitude)
    exact: Floats = small.choose(subnormal, value)
    return _signed(exact, (found & 0x80) << 24)


def _signed(value: Floats, sign: Words) -> Floats:
    return (value.bits() | sign).floats()


def _number(found: Words) -> Floats:
    """Return integers, of two's complement, as floats."""
    return Floats(found.code, found.code.build.sitofp(found.raw, found.code.typed(FLOAT)))


def _shifted(value: Words, places: Words) -> Words:
    return Words(value.code, value.code.build.lshr(value.raw, places.raw))


def _rounded(value: Floats) -> Words:
    """Return a number rounded to bfloat16, nearest, ties to even, as the lower half of a word; every NaN is one NaN."""
    bits = value.bits()
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    magnitude = bits & (_SIGN - 1)
    number = magnitude.minimum(_INFINITY).equals(magnitude)
    found: Words = number.choose(rounded, NAN_BITS)
    return found
