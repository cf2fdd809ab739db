"""Write the CPU's functions for FP8: each segment at the better of two scales, 16 neighbouring values to a vector.

Called by `fp8.py` for a function that is not in the cache; the arithmetic is that of `mfptq.fp8`, to the same bits. Values
are read before the codes that may replace them are written, so that codes may go where the values lie.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from ..fp8 import LANES
from ..nvfp4 import E4M3_MAX
from .blocks import F16_TO_F32, rounded_scale
from .vector import BYTE, DOUBLE, FLOAT, HALF, LONG, VOID, WORD, Code, Floats, Variable, Words

_GRID = 2.0**14  # added to it, a value below 2**-6 is rounded to the step of subnormal codes, 2**-9
ERRORS = "fp8_errors_"
_BIAS = 960  # the code of a normal E4M3 value is its float32 bits >> 20, less this


def emit(module: ir.Module, name: str) -> None:
    """Write the function of a name: fp8_BF16 for one rounding, fp8_exact_BF16 for those of compressed-tensors.

    Its arguments: (source, codes, stats [7], where each segment begins and the last one ends [n + 1], their scales [n], other
    scales [n], n). A segment whose error is less at its other scale is quantized by it, and has it among the scales then.
    """
    if name.startswith(ERRORS):
        _emit_errors(module, name)
        return
    dtype, exact = name.rpartition("_")[2], "exact" in name
    element = WORD if dtype == "F32" else HALF
    pointers = [each.as_pointer() for each in (element, BYTE, DOUBLE, LONG, FLOAT, FLOAT)]
    function = ir.Function(module, ir.FunctionType(VOID, [*pointers, LONG]), name)
    source, codes, stats, starts, scales, others, count = function.args
    code = Code(function, LANES, fused=False)
    values = _Values(code, source, dtype, exact=exact)
    with code.loop(LONG(0), count, LONG(1)) as number:
        ends = [code.load(code.at(starts, code.build.add(number, LONG(k))), LONG, 8) for k in (0, 1)]
        place = code.at(scales, number)
        _choose(values, ends, place, code.load(code.at(others, number), FLOAT, 4))
        _quantize(values, ends, code.spread(code.load(place, FLOAT, 4)), (codes, stats))
    code.build.ret_void()


def _emit_errors(module: ir.Module, name: str) -> None:
    """Write a function that adds errors to the sums of blocks, lane by lane: fp8_errors_BF16.

    Its arguments: (source, sums [m, 2, 16], where each segment begins and the last one ends [n + 1], its block [n], the blocks'
    scales [m], other scales [m], n).
    """
    dtype = name.removeprefix(ERRORS)
    element = WORD if dtype == "F32" else HALF
    pointers = [each.as_pointer() for each in (element, DOUBLE, LONG, LONG, FLOAT, FLOAT)]
    function = ir.Function(module, ir.FunctionType(VOID, [*pointers, LONG]), name)
    source, sums, starts, places, scales, others, count = function.args
    code = Code(function, LANES, fused=False)
    values, build = _Values(code, source, dtype, exact=False), code.build
    held = [code.variable(code.constant(DOUBLE, 0.0)) for _ in range(2)]
    with code.loop(LONG(0), count, LONG(1)) as number:
        ends = [code.load(code.at(starts, build.add(number, LONG(k))), LONG, 8) for k in (0, 1)]
        block = code.load(code.at(places, number), LONG, 8)
        factors = [code.spread(code.load(code.at(each, block), FLOAT, 4)) for each in (scales, others)]
        first = code.at(sums, build.mul(block, LONG(2 * LANES)))
        rows = [code.at(first, LONG(row * LANES)) for row in range(2)]
        for variable, row in zip(held, rows, strict=True):
            variable.set(code.load(row, code.typed(DOUBLE), 8))
        _add_errors(values, ends, factors, held)
        for variable, row in zip(held, rows, strict=True):
            code.store(variable.get(), row, 8)
    build.ret_void()


def _add_errors(values: _Values, ends: list[Any], scales: list[Floats], sums: list[Variable]) -> None:
    """Add the squared errors of a segment at some scales to their sums, lane by lane."""
    code = values.code
    with code.loop(ends[0], ends[1], LONG(LANES)) as index:
        x, _ = values.read(index)
        for held, scale in zip(sums, scales, strict=True):
            difference = values.rounded(x, scale)[1] * scale - x
            held.set(code.build.fadd(held.get(), _square(difference)))


class _Values:
    """Sixteen values at an index, and what they become at a scale."""

    def __init__(self, code: Code, source: Any, dtype: str, *, exact: bool) -> None:
        self.code = code
        self._source, self._dtype, self._exact = source, dtype, exact

    def read(self, index: Any) -> tuple[Floats, Words]:
        """Return 16 magnitudes, and bit 7 set where the sign is."""
        code, place = self.code, self.code.at(self._source, index)
        if self._dtype == "F32":
            bits = Words(code, code.load(place, code.typed(WORD), 4))
            return (bits & 0x7FFFFFFF).floats(), (bits >> 24) & 0x80
        halves = code.load(place, code.typed(HALF), 2)
        bits = Words(code, code.build.zext(halves, code.typed(WORD)))
        magnitude = bits & 0x7FFF
        x = (magnitude << 16).floats() if self._dtype == "BF16" else (magnitude << 13).floats() * F16_TO_F32
        return x, (bits >> 8) & 0x80

    def rounded(self, x: Floats, scale: Floats) -> tuple[Words, Floats]:
        """Return (codes, float32 values) of magnitudes at a scale."""
        y = x / scale
        y = (_in_dtype(y, self._dtype) if self._exact else y).minimum(E4M3_MAX)
        steps, normal, low = y + _GRID, rounded_scale(y), y < 2.0**-6
        found: Words = low.choose(steps.bits() - self.code.floats(_GRID).bits(), (normal >> 20) - _BIAS)
        value: Floats = low.choose(steps - _GRID, normal.floats())
        return found, value


def _in_dtype(y: Floats, dtype: str) -> Floats:
    """Return magnitudes rounded to a dtype, nearest, ties to even; beyond float16's range anything above 448."""
    bits = y.bits()
    if dtype == "BF16":
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).floats()
    if dtype == "F16":
        normal = ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000).floats()
        found: Floats = (y < 2.0**-14).choose((y + 0.5) - 0.5, normal)
        return found
    return y


def _square(x: Floats) -> Any:
    """Return squares as float64, which holds those of all float32 numbers."""
    return x.code.build.fmul(x.doubles(), x.doubles())


def _total(code: Code, vector: Any) -> Any:
    """Return the sum of a vector's lanes, in their order."""
    total, *others = [code.build.extract_element(vector, WORD(lane)) for lane in range(LANES)]
    for lane in others:
        total = code.build.fadd(total, lane)
    return total


def _choose(values: _Values, ends: list[Any], place: Any, other: Any) -> None:
    """Put the other scale in the place of the first where its squared error over the segment is less."""
    code = values.code
    first = code.load(place, FLOAT, 4)
    sums = [code.variable(code.constant(DOUBLE, 0.0)) for _ in range(2)]
    differ = code.build.fcmp_ordered("!=", first, other)
    with code.build.if_then(differ, likely=False):
        scales = [code.spread(each) for each in (first, other)]
        for held in sums:
            held.set(code.constant(DOUBLE, 0.0))
        _add_errors(values, ends, scales, sums)
        one, two = (_total(code, held.get()) for held in sums)
        code.store(code.build.select(code.build.fcmp_ordered("<", two, one), other, first), place, 4)


def _quantize(values: _Values, ends: list[Any], scale: Floats, out: tuple[Any, Any]) -> None:
    """Write a segment's codes, and add to the statistics what quantizing did to it."""
    code, (codes, stats) = values.code, out
    sums = [code.variable(code.constant(DOUBLE, 0.0)) for _ in range(2)]
    lost = code.variable(code.words(0))
    for held in sums:
        held.set(code.constant(DOUBLE, 0.0))
    lost.set(code.words(0))
    with code.loop(ends[0], ends[1], LONG(LANES)) as index:
        x, sign = values.read(index)
        found, value = values.rounded(x, scale)
        bytes_ = code.build.trunc((found | sign).raw, ir.VectorType(BYTE, LANES))
        code.store(bytes_, code.at(codes, index))
        difference = value * scale - x
        for held, each in zip(sums, (difference, x), strict=True):
            held.set(code.build.fadd(held.get(), _square(each)))
        lost.set(lost.get() + ((x > 0.0) & found.equals(0)).count())
    error, norm = (_total(code, held.get()) for held in sums)
    zeroed = _total(code, code.build.uitofp(lost.get().raw, code.typed(DOUBLE)))
    _tally(code, stats, (error, norm, zeroed))


def _tally(code: Code, stats: Any, found: tuple[Any, Any, Any]) -> None:
    """Add a segment's squared error, squared norm and count of values that became zero to the seven statistics."""
    build, (error, norm, zeroed) = code.build, found
    empty = build.fcmp_ordered("==", norm, DOUBLE(0.0))
    share = build.fdiv(error, build.select(empty, DOUBLE(1.0), norm))
    relative = code.intrinsic("llvm.sqrt.f64", DOUBLE, [share])
    none = build.uitofp(empty, DOUBLE)
    for place, value in ((0, error), (1, norm), (2, error), (4, zeroed), (6, none)):
        pointer = code.at(stats, LONG(place))
        code.store(build.fadd(code.load(pointer, DOUBLE, 8), value), pointer, 8)
    pointer = code.at(stats, LONG(3))
    worst = code.load(pointer, DOUBLE, 8)
    code.store(build.select(build.fcmp_ordered(">", relative, worst), relative, worst), pointer, 8)
