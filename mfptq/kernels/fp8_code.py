"""Write the functions for FP8: each segment at the better of two scales, 16 neighbouring values to a vector.

Called by `fp8.py` for a function that is not in the cache, and by `fp8_ptx.py`, which has a thread do a segment's work as a core
does it; the arithmetic is that of `mfptq.fp8`, to the same bits. Values are read before the codes that may replace them are
written, so that codes may go where the values lie.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from ..fp8 import LANES
from ..nvfp4 import E4M3_MAX
from .blocks import F16_TO_F32
from .compiling import has_fused
from .stats import WORST
from .vector import BYTE, DOUBLE, FLOAT, HALF, LONG, VOID, WORD, Code, Floats, Variable, Words

ERRORS = "fp8_errors_"
_EXPONENT, _LEAST_POWER = 0x7F800000, (127 - 6) << 23  # of float32 bits: where the exponent is, and 2^-6
_TO_GRID = 20 << 23  # added to the bits of 2^e, gives those of 2^(e + 20), beside which 2^(e - 3) is the last place
_BIAS = 968  # a power's bits >> 20, less this, is the code of the values from there on, less the 8 steps up to it


def emit(module: ir.Module, name: str) -> None:
    """Write the function of a name: fp8_BF16 for one rounding, fp8_exact_BF16 for those of compressed-tensors.

    Its arguments: (source, codes, stats [7], where each segment begins and the last one ends [n + 1], their scales [n], other
    scales [n], n). A segment whose error is less at its other scale is quantized by it, and has it among the scales then.
    """
    if name.startswith(ERRORS):
        _emit_errors(module, name)
        return
    dtype, exact = name.rpartition("_")[2], "exact" in name
    code = _function(module, name, element(dtype), [BYTE, DOUBLE, LONG, FLOAT, FLOAT])
    source, codes, stats, starts, scales, others, count = code.function.args
    values = Values(code, source, dtype, exact=exact)
    with code.loop(LONG(0), count, LONG(1)) as number:
        found = Segment.at(values, starts, number).quantize((scales, others), number, codes)
        _tally(code, stats, found)
    code.build.ret_void()


def element(dtype: str) -> ir.Type:
    """Return the type of a stored value."""
    return WORD if dtype == "F32" else HALF


def _function(module: ir.Module, name: str, first: ir.Type, others: list[ir.Type]) -> Code:
    pointers = [each.as_pointer() for each in (first, *others)]
    return Code(ir.Function(module, ir.FunctionType(VOID, [*pointers, LONG]), name), LANES, fused=has_fused())


def _emit_errors(module: ir.Module, name: str) -> None:
    """Write a function that adds errors to the sums of blocks, lane by lane: fp8_errors_BF16.

    Its arguments: (source, sums [m, 2, 16], where each segment begins and the last one ends [n + 1], its block [n], the blocks'
    scales [m], other scales [m], n).
    """
    dtype = name.removeprefix(ERRORS)
    code = _function(module, name, element(dtype), [DOUBLE, LONG, LONG, FLOAT, FLOAT])
    source, sums, starts, places, scales, others, count = code.function.args
    values, build = Values(code, source, dtype, exact=False), code.build
    held = [code.variable(code.constant(DOUBLE, 0.0)) for _ in range(2)]
    with code.loop(LONG(0), count, LONG(1)) as number:
        segment, block = Segment.at(values, starts, number), code.load(code.at(places, number), LONG, 8)
        factors = [code.spread(code.load(code.at(each, block), FLOAT, 4)) for each in (scales, others)]
        first = code.at(sums, build.mul(block, LONG(2 * LANES)))
        rows = [code.at(first, LONG(row * LANES)) for row in range(2)]
        for variable, row in zip(held, rows, strict=True):
            variable.set(code.load(row, code.typed(DOUBLE), 8))
        segment.add_errors(factors, held)
        for variable, row in zip(held, rows, strict=True):
            code.store(variable.get(), row, 8)
    build.ret_void()


class Values:
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
        """Return (codes, float32 values) of magnitudes at a scale.

        A value from 2^e on is rounded where 2^(e + 20) is added: what is left of the sum's mantissa counts steps of 2^(e - 3).
        Below 2^-6 steps stay as they are there, those of subnormal codes.
        """
        y = x / scale
        y = (_in_dtype(y, self._dtype) if self._exact else y).minimum(E4M3_MAX)
        power = (y.bits() & _EXPONENT).maximum(_LEAST_POWER)
        grid = (power + _TO_GRID).floats()
        sum_ = y + grid
        return (sum_.bits() - power) + (power >> 20) - (_TO_GRID + _BIAS), sum_ - grid


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


class SegmentStats(NamedTuple):
    """What quantizing did to a segment, float64: squared error, squared norm, their quotient, values lost, 1 if all are zero."""

    error: Any
    norm: Any
    share: Any
    zeroed: Any
    empty: Any


class Segment(NamedTuple):
    """The values from one index to another, which share a scale."""

    values: Values
    begin: Any
    end: Any

    @classmethod
    def at(cls, values: Values, starts: Any, number: Any) -> Segment:
        """Return a segment by its number; `starts` points to where each begins and the last one ends."""
        code = values.code
        ends = (code.load(code.at(starts, code.build.add(number, LONG(k))), LONG, 8) for k in (0, 1))
        return cls(values, *ends)

    def quantize(self, scales: tuple[Any, Any], number: Any, codes: Any) -> SegmentStats:
        """Write the segment's codes by the better of its scales, which is put in the place of the first."""
        code = self.values.code
        first, second = (code.at(each, number) for each in scales)
        self._choose(first, code.load(second, FLOAT, 4))
        return self._write(code.spread(code.load(first, FLOAT, 4)), codes)

    def add_errors(self, scales: list[Floats], sums: list[Variable]) -> None:
        """Add the squared errors at some scales to their sums, lane by lane."""
        with self.values.code.loop(self.begin, self.end, LONG(LANES)) as index:
            x, _ = self.values.read(index)
            for held, scale in zip(sums, scales, strict=True):
                _add_square(held, self.values.rounded(x, scale)[1] * scale - x)

    def _choose(self, place: Any, other: Any) -> None:
        """Put the other scale in the place of the first where its squared error over the segment is less."""
        code = self.values.code
        first = code.load(place, FLOAT, 4)
        differ = code.build.fcmp_ordered("!=", first, other)
        with code.build.if_then(differ, likely=False):
            sums = [code.variable(code.constant(DOUBLE, 0.0)) for _ in range(2)]
            self.add_errors([code.spread(each) for each in (first, other)], sums)
            one, two = (_total(code, held.get()) for held in sums)
            code.store(code.build.select(code.build.fcmp_ordered("<", two, one), other, first), place, 4)

    def _write(self, scale: Floats, codes: Any) -> SegmentStats:
        code = self.values.code
        sums = [code.variable(code.constant(DOUBLE, 0.0)) for _ in range(2)]
        lost = code.variable(code.words(0))
        with code.loop(self.begin, self.end, LONG(LANES)) as index:
            x, sign = self.values.read(index)
            found, value = self.values.rounded(x, scale)
            bytes_ = code.build.trunc((found | sign).raw, ir.VectorType(BYTE, LANES))
            code.store(bytes_, code.at(codes, index))
            for held, each in zip(sums, (value * scale - x, x), strict=True):
                _add_square(held, each)
            lost.set(lost.get() + ((x > 0.0) & found.equals(0)).count())
        error, norm = (_total(code, held.get()) for held in sums)
        empty = code.build.fcmp_ordered("==", norm, DOUBLE(0.0))
        share = code.build.fdiv(error, code.build.select(empty, DOUBLE(1.0), norm))
        zeroed = _total(code, code.build.uitofp(lost.get().raw, code.typed(DOUBLE)))
        return SegmentStats(error, norm, share, zeroed, code.build.uitofp(empty, DOUBLE))


def _add_square(held: Variable, x: Floats) -> None:
    """Add squares to sums as float64, which holds those of all float32 numbers exactly: fused or not, the sums are the same."""
    code, wide = x.code, x.doubles()
    if code.fused:
        held.set(code.each("fma", "f64", [wide, wide, held.get()]))
    else:
        held.set(code.build.fadd(held.get(), code.build.fmul(wide, wide)))


def _total(code: Code, vector: Any) -> Any:
    """Return the sum of a vector's lanes, in their order."""
    total, *others = [code.build.extract_element(vector, WORD(lane)) for lane in range(LANES)]
    for lane in others:
        total = code.build.fadd(total, lane)
    return total


def _tally(code: Code, stats: Any, found: SegmentStats) -> None:
    """Add what quantizing did to a segment to the seven statistics."""
    build = code.build
    for place, value in ((0, found.error), (1, found.norm), (2, found.error), (4, found.zeroed), (6, found.empty)):
        pointer = code.at(stats, LONG(place))
        code.store(build.fadd(code.load(pointer, DOUBLE, 8), value), pointer, 8)
    relative = code.intrinsic("llvm.sqrt.f64", DOUBLE, [found.share])
    pointer = code.at(stats, LONG(WORST))
    worst = code.load(pointer, DOUBLE, 8)
    code.store(build.select(build.fcmp_ordered(">", relative, worst), relative, worst), pointer, 8)
