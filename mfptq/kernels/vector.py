"""Write LLVM instructions by ordinary arithmetic: a small language of numbers whose operators emit code.

The arithmetic (`blocks.py`, `calibrated_blocks.py`) is written in it, once for every device: a value is one number for each
of `lanes` blocks, a vector register on a CPU, a plain number in a GPU's thread. All give the same bits, so that nothing here
may be contracted, reordered or approximated; a fused product is written only where the product is exact.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from llvmlite import ir

if TYPE_CHECKING:
    from typing_extensions import Self

FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
BYTE, HALF, WORD, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
BIT, VOID = ir.IntType(1), ir.VoidType()


class Code:
    """Where instructions go: into one function, for values of so many lanes."""

    def __init__(self, function: ir.Function, lanes: int, *, fused: bool = True) -> None:
        self.build = ir.IRBuilder(function.append_basic_block("entry"))
        self.function = function
        self.lanes = lanes
        self.fused = fused

    def one_lane(self) -> Code:
        """Return the same place for values of one lane."""
        single = copy.copy(self)
        single.lanes = 1
        return single

    def typed(self, element: ir.Type) -> ir.Type:
        """Return the type of a value of such elements."""
        return ir.VectorType(element, self.lanes) if self.lanes > 1 else element

    def constant(self, element: ir.Type, number: float) -> ir.Constant:
        """Return the same number in every lane."""
        return ir.Constant(self.typed(element), [number] * self.lanes if self.lanes > 1 else number)

    def floats(self, number: float) -> Floats:
        """Return a float32 constant; what float32 cannot hold is rounded."""
        return Floats(self, self.constant(FLOAT, struct.unpack("<f", struct.pack("<f", number))[0]))

    def words(self, number: int) -> Words:
        """Return a uint32 constant."""
        return Words(self, self.constant(WORD, number))

    def spread(self, scalar: Any) -> Any:
        """Return a float32 or uint32 scalar in every lane."""
        raw = scalar
        if self.lanes > 1:
            vector = self.build.insert_element(ir.Constant(self.typed(scalar.type), ir.Undefined), scalar, WORD(0))
            raw = self.shuffle(vector, vector, [0] * self.lanes)
        return Floats(self, raw) if scalar.type == FLOAT else Words(self, raw)

    def shuffle(self, first: Any, second: Any, lanes: Sequence[int]) -> Any:
        """Return a vector of the lanes named, of two vectors put together."""
        return self.build.shuffle_vector(first, second, ir.Constant(ir.VectorType(WORD, len(lanes)), list(lanes)))

    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[Any]) -> Any:
        """Call one of LLVM's own functions, or of the C library's."""
        module = self.function.module
        signature = ir.FunctionType(result, [each.type for each in arguments])
        found = module.globals.get(name) or ir.Function(module, signature, name)
        found.attributes.add("nounwind")
        return self.build.call(found, arguments)

    def each(self, name: str, element: str, arguments: Sequence[Any]) -> Any:
        """Call one of LLVM's functions that do the same in every lane, to values of one type."""
        suffix = f"v{self.lanes}{element}" if self.lanes > 1 else element
        return self.intrinsic(f"llvm.{name}.{suffix}", arguments[0].type, arguments)

    def at(self, pointer: Any, index: Any) -> Any:
        """Return a pointer to an element further on."""
        return self.build.gep(pointer, [index])

    def load(self, pointer: Any, as_type: ir.Type, align: int = 1) -> Any:
        """Return what lies at a pointer, seen as a type."""
        return self.build.load(self._seen(pointer, as_type), align=align)

    def store(self, value: Any, pointer: Any, align: int = 1) -> None:
        """Write a value of any type to a pointer."""
        self.build.store(value, self._seen(pointer, value.type), align=align)

    def _seen(self, pointer: Any, as_type: ir.Type) -> Any:
        return self.build.bitcast(pointer, as_type.as_pointer(pointer.type.addrspace))

    def variable(self, initial: Any) -> Variable:
        """Return a variable that holds a value or an instruction's result; registers, in the end."""
        return Variable(self, initial)

    @contextmanager
    def loop(self, begin: Any, end: Any, step: Any) -> Iterator[Any]:
        """Write a loop's body: yields the index; nothing is done where `begin` is not below `end`, which may be a variable."""
        before, build = self.build.block, self.build
        now = end.get if isinstance(end, Variable) else lambda: end
        body, after = (self.function.append_basic_block(name) for name in ("loop", "after"))
        build.cbranch(build.icmp_signed("<", begin, now()), body, after)
        build.position_at_end(body)
        index = build.phi(begin.type)
        index.add_incoming(begin, before)
        yield index
        following = build.add(index, step)
        index.add_incoming(following, build.block)
        build.cbranch(build.icmp_signed("<", following, now()), body, after)
        build.position_at_end(after)


class Variable:
    """Memory for one value."""

    def __init__(self, code: Code, initial: Any) -> None:
        self._code = code
        self._class = type(initial) if isinstance(initial, Value) else None
        with code.build.goto_entry_block():
            self._place = code.build.alloca(_raw(initial).type)
        self.set(initial)

    def set(self, value: Any) -> None:
        """Hold another value."""
        self._code.build.store(_raw(value), self._place)

    def get(self) -> Any:
        """Return what is held."""
        found = self._code.build.load(self._place)
        return found if self._class is None else self._class(self._code, found)


class Value:
    """One number for each lane."""

    __slots__ = ("code", "raw")

    def __init__(self, code: Code, raw: Any) -> None:
        self.code = code
        self.raw = raw


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, Value) else value


class Mask(Value):
    """True or false for each lane."""

    __slots__ = ()

    def __and__(self, other: Mask) -> Mask:
        return Mask(self.code, self.code.build.and_(self.raw, other.raw))

    def choose(self, yes: Any, no: Any) -> Any:
        """Return `yes` where true, else `no`: two values of one class, of which one may be a Python number."""
        chosen = type(yes) if isinstance(yes, Value) else type(no)
        return chosen(self.code, self.code.build.select(self.raw, _same(yes, no).raw, _same(no, yes).raw))

    def count(self) -> Words:
        """Return 1 where true, else 0."""
        return Words(self.code, self.code.build.zext(self.raw, self.code.typed(WORD)))

    def everywhere(self) -> Any:
        """Return whether it is true in every lane, one bit."""
        return self._together(-1)

    def nowhere(self) -> Any:
        """Return whether it is false in every lane, one bit."""
        return self._together(0)

    def _together(self, wanted: int) -> Any:
        bits = self.code.build.bitcast(self.raw, ir.IntType(self.code.lanes))
        return self.code.build.icmp_unsigned("==", bits, ir.Constant(bits.type, wanted))


def _same(value: Any, like: Any) -> Any:
    """Return a value, or a Python number as a value of the other's class."""
    if isinstance(value, Value):
        return value
    return like.code.floats(value) if isinstance(like, Floats) else like.code.words(value)


class Number(Value):
    """Numbers of one class; the other operand may be a Python number."""

    __slots__ = ()
    _comparison: ClassVar[str]  # LLVM's instruction

    def _with(self, write: Any, other: Self | float) -> Self:
        return type(self)(self.code, write(self.raw, _same(other, self).raw))

    def _compared(self, sign: str, other: Self | float) -> Mask:
        return Mask(self.code, getattr(self.code.build, self._comparison)(sign, self.raw, _same(other, self).raw))

    def maximum(self, other: Self | float) -> Self:
        """Return the larger of two numbers, neither of them NaN."""
        found: Self = self._compared(">", other).choose(self, other)
        return found

    def minimum(self, other: Self | float) -> Self:
        """Return the smaller of two numbers, neither of them NaN."""
        found: Self = self._compared("<", other).choose(self, other)
        return found


class Floats(Number):
    """Float32 numbers; each operation rounds to nearest, ties to even."""

    __slots__ = ()
    _comparison = "fcmp_ordered"

    def __add__(self, other: Floats | float) -> Floats:
        return self._with(self.code.build.fadd, other)

    def __sub__(self, other: Floats | float) -> Floats:
        return self._with(self.code.build.fsub, other)

    def __mul__(self, other: Floats | float) -> Floats:
        return self._with(self.code.build.fmul, other)

    def __truediv__(self, other: Floats | float) -> Floats:
        return self._with(self.code.build.fdiv, other)

    def __neg__(self) -> Floats:
        return Floats(self.code, self.code.build.fneg(self.raw))

    def __gt__(self, other: Floats | float) -> Mask:
        return self._compared(">", other)

    def __lt__(self, other: Floats | float) -> Mask:
        return self._compared("<", other)

    def __le__(self, other: Floats | float) -> Mask:
        return self._compared("<=", other)

    def bits(self) -> Words:
        """Return the bits that stand for the numbers."""
        return Words(self.code, self.code.build.bitcast(self.raw, self.code.typed(WORD)))

    def doubles(self) -> Any:
        """Return the numbers as float64, an instruction's result."""
        return self.code.build.fpext(self.raw, self.code.typed(DOUBLE))

    def exact_times(self, factor: Floats | float, add: Floats | float) -> Floats:
        """Return self * factor + add where the product is exact: in one instruction where there is one."""
        if not self.code.fused:
            return self * factor + add
        operands = [self.raw, _same(factor, self).raw, _same(add, self).raw]
        return Floats(self.code, self.code.each("fma", "f32", operands))


class Words(Number):
    """Unsigned 32-bit integers, or 32 bits; arithmetic wraps."""

    __slots__ = ()
    _comparison = "icmp_unsigned"

    def __add__(self, other: Words | int) -> Words:
        return self._with(self.code.build.add, other)

    def __sub__(self, other: Words | int) -> Words:
        return self._with(self.code.build.sub, other)

    def __and__(self, other: Words | int) -> Words:
        return self._with(self.code.build.and_, other)

    def __or__(self, other: Words | int) -> Words:
        return self._with(self.code.build.or_, other)

    def __lshift__(self, places: int) -> Words:
        return self._with(self.code.build.shl, places) if places else self

    def __rshift__(self, places: int) -> Words:
        return self._with(self.code.build.lshr, places) if places else self

    def equals(self, other: Words | int) -> Mask:
        """Return where the two are equal."""
        return self._compared("==", other)

    def ones(self) -> Words:
        """Return how many bits are set."""
        return Words(self.code, self.code.each("ctpop", "i32", [self.raw]))

    def floats(self) -> Floats:
        """Return the float32 numbers that the bits stand for."""
        return Floats(self.code, self.code.build.bitcast(self.raw, self.code.typed(FLOAT)))
