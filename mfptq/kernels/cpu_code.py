"""Write the CPU's functions: loops around the arithmetic, for LLVM vectors of 16 blocks, one to a lane.

Called by `compiling.py` for a function that is not in the cache. The 16 blocks are transposed, so that word j of every block
is one vector. 16 lanes on every processor: where registers are shorter, LLVM takes several, and sums come out the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from ..nvfp4 import BLOCK_SIZE
from .blocks import ErrorSums, QuantizedBlock, block_errors, block_words, minmax, search, unpack_block
from .calibrated import FEEDBACK, FUNCTIONS
from .calibrated_blocks import ColumnStatistics, calibrated, calibrated_errors, signed_values
from .compiling import has_fused
from .feedback_blocks import Record, RowSums, with_feedback
from .stats import ERROR_FIELDS, WORST
from .vector import BIT, BYTE, DOUBLE, FLOAT, HALF, LONG, VOID, WORD, Code, Words

LANES = 16


def transposed(code: Code, source: Any, words: int, stride: Any = None) -> list[Words]:
    """Return, of 16 blocks of 8 or 16 words, word j of every block as vector j; block k begins `k * stride` words on.

    Each step exchanges, between pairs of vectors, one bit of the word's number for one of the block's.
    """
    per = LANES // words  # blocks that one vector holds when it is loaded
    if stride is None or per == 1:
        apart = stride if stride is not None else LONG(words)
        rows = [
            code.load(code.at(source, code.build.mul(apart, LONG(k))), code.typed(WORD), 4)
            for k in range(0, LANES, per)
        ]
    else:
        short = ir.VectorType(WORD, words)
        halves = [code.load(code.at(source, code.build.mul(stride, LONG(k))), short, 4) for k in range(LANES)]
        rows = [code.shuffle(halves[k], halves[k + 1], range(LANES)) for k in range(0, LANES, 2)]
    places = [[(row * per + lane // words, lane % words) for lane in range(LANES)] for row in range(words)]
    for step in [2**bit for bit in range(words.bit_length() - 1)]:
        for first in [row for row in range(words) if not row & step]:
            second = first | step
            both = places[first] + places[second]
            for row, bit in ((first, 0), (second, step)):
                places[row] = sorted((p for p in both if p[1] & step == bit), key=lambda p: (p[1], p[0]))
            masks = [[both.index(place) for place in places[row]] for row in (first, second)]
            rows[first], rows[second] = (code.shuffle(rows[first], rows[second], mask) for mask in masks)
    return [Words(code, row) for row in rows]


def _store_sums(code: Code, sums: ErrorSums, stats: Any, padding: Any) -> None:
    """Write the statistics of all lanes together: sums in the order of lanes, and the worst relative error.

    `padding` is how many of the blocks were only there to fill a chunk.
    """
    build, values = code.build, sums.doubles()
    for place, vector in enumerate(values):
        total, *others = [build.extract_element(vector, WORD(lane)) for lane in range(LANES)]
        for lane in others:
            larger = build.fcmp_ordered(">", lane, total)
            total = build.select(larger, lane, total) if place == WORST else build.fadd(total, lane)
        if place == WORST:
            total = code.intrinsic("llvm.sqrt.f64", DOUBLE, [total])
        if place == ERROR_FIELDS - 1:
            total = build.fsub(total, build.sitofp(padding, DOUBLE))
        code.store(total, code.at(stats, LONG(place)))


def _store_chunk(code: Code, done: QuantizedBlock, packed: Any, scales: Any) -> None:
    """Write 16 blocks one behind the other: two words each, and one byte each."""
    low, high = (word.raw for word in done.words)
    for half in (0, 1):
        mask = [half * 8 + lane // 2 + LANES * (lane % 2) for lane in range(LANES)]
        code.store(code.shuffle(low, high, mask), code.at(packed, LONG(half * LANES)))
    code.store(code.build.trunc(done.code.raw, ir.VectorType(BYTE, LANES)), scales)


def emit(module: ir.Module, name: str) -> None:
    """Write the function of a name: of a method and a dtype (search_BF16), or of a width in bits (amax_16, amax_in_file_16)."""
    first = name.split("_", maxsplit=1)[0]
    if first == "amax":
        (_emit_amax_in_file if "file" in name else _emit_amax)(module, name)
    else:
        (_emit_calibrated if first in FUNCTIONS.values() else _emit_many)(module, name)


def _emit_many(module: ir.Module, name: str) -> None:
    """Write a function for many weights that lie one behind the other.

    Its arguments: (source, packed, scales, stats [n, 7], where each weight begins and the last one ends, counted in blocks
    [n + 1], their global scales [n], n).
    """
    one = _emit_one(module, name)
    pointers = [element.as_pointer() for element in (WORD, WORD, BYTE, DOUBLE, LONG, FLOAT)]
    function = ir.Function(module, ir.FunctionType(VOID, [*pointers, LONG]), name)
    source, packed, scales, stats, starts, factors, count = function.args
    code = Code(function, 1)
    with code.loop(LONG(0), count, LONG(1)) as index:
        begin, end = (code.load(code.at(starts, code.build.add(index, LONG(k))), LONG, 8) for k in (0, 1))
        places = [
            code.at(pointer, code.build.mul(begin, LONG(size)))
            for pointer, size in ((source, block_words(name.split("_")[1])), (packed, 2), (scales, 1))
        ]
        statistics = code.at(stats, code.build.mul(index, LONG(ERROR_FIELDS)))
        factor = code.load(code.at(factors, index), FLOAT, 4)
        code.build.call(one, [*places, statistics, code.build.sub(end, begin), factor])
    code.build.ret_void()


def _emit_one(module: ir.Module, name: str) -> ir.Function:
    """Write a function for one weight: (source, packed, scales, stats, blocks, global scale)."""
    method, dtype = name.split("_")
    pointers = [element.as_pointer() for element in (WORD, WORD, BYTE, DOUBLE)]
    function = ir.Function(module, ir.FunctionType(VOID, [*pointers, LONG, FLOAT]), f"{name}_one")
    function.linkage = "internal"
    for pointer in function.args[:4]:
        pointer.add_attribute("noalias")
    source, packed, scales, stats, blocks, factor = function.args
    code = Code(function, LANES, fused=has_fused())
    sums, global_scale, words = ErrorSums(code), code.spread(factor), block_words(dtype)
    sizes = (4 * words, 8, 1)  # bytes of a block: as it comes, packed, its scale
    with code.loop(LONG(0), blocks, LONG(LANES)) as block:
        places = [
            code.at(each, code.build.mul(block, LONG(k))) for each, k in ((source, words), (packed, 2), (scales, 1))
        ]
        chunk = _Chunk(code, places, sizes, code.build.sub(blocks, block))
        found = unpack_block(transposed(code, chunk.source, words), dtype)
        done = search(code, found, global_scale) if method == "search" else minmax(code, found, global_scale, dtype)
        _store_chunk(code, done, chunk.packed, chunk.scales)
        chunk.close()
        sums.add(block_errors(found, done))
    padding = code.build.and_(code.build.sub(LONG(0), blocks), LONG(LANES - 1))
    _store_sums(code, sums, stats, padding)
    code.build.ret_void()
    return function


def _emit_calibrated(module: ir.Module, name: str) -> None:
    """Write a function for whole chunks of 16 rows, block by block: rows share their columns' statistics.

    Its arguments: (source, packed, scales, stats [7], statistics, rows, blocks of a row, rank, global scale). By FEEDBACK, whose
    factors have that rank, blocks come in the order of their records.
    """
    method, dtype = name.split("_")
    pointers = [element.as_pointer() for element in (WORD, WORD, BYTE, DOUBLE, FLOAT)]
    function = ir.Function(module, ir.FunctionType(VOID, [*pointers, LONG, LONG, LONG, FLOAT]), name)
    source, packed, scales, stats, known, rows, blocks, rank, factor = function.args
    for pointer in function.args[: len(pointers)]:
        pointer.add_attribute("noalias")
    code = Code(function, LANES, fused=has_fused())
    errors, row_sums, global_scale, words = ErrorSums(code), RowSums(code), code.spread(factor), block_words(dtype)
    build, stride = code.build, code.build.mul(blocks, LONG(words))
    size = BLOCK_SIZE if method == "weighted" else BLOCK_SIZE**2
    with code.loop(LONG(0), rows, LONG(LANES)) as row:
        if method == FEEDBACK:
            row_sums.clear(rank)
        with code.loop(LONG(0), blocks, LONG(1)) as turn:
            record = Record.of(code, known, turn, rank) if method == FEEDBACK else None
            first = build.add(build.mul(row, blocks), turn if record is None else record.place())
            x = signed_values(transposed(code, code.at(source, build.mul(first, LONG(words))), words, stride), dtype)
            if record is not None:
                done = with_feedback(x, global_scale, record, row_sums)
            else:
                statistics = ColumnStatistics(code, code.at(known, build.mul(turn, LONG(size))))
                done = calibrated(x, global_scale, statistics, method)
            places = [build.add(first, build.mul(blocks, LONG(k))) for k in range(LANES)]
            _store_rows(code, done, (packed, scales), places)
            errors.add(calibrated_errors(x, done))
    _store_sums(code, errors, stats, LONG(0))
    build.ret_void()


def _store_rows(code: Code, done: QuantizedBlock, out: Any, places: Sequence[Any]) -> None:
    """Write a block of each of 16 rows at its place, counted in blocks."""
    packed, scales = out
    codes = code.build.trunc(done.code.raw, ir.VectorType(BYTE, LANES))
    low, high = (word.raw for word in done.words)
    for lane, place in enumerate(places):
        both = code.shuffle(low, high, (lane, LANES + lane))
        code.store(both, code.at(packed, code.build.mul(place, LONG(2))), 4)
        code.store(code.build.extract_element(codes, WORD(lane)), code.at(scales, place))


class _Chunk:
    """Where 16 blocks come from and go to: the last ones of a weight, if they are fewer, by way of scratch memory."""

    def __init__(self, code: Code, places: Sequence[Any], sizes: Sequence[int], left: Any) -> None:
        build = code.build
        self._code, self._places, self._sizes, self._left = code, places, sizes, left
        self._partial = build.icmp_signed("<", left, LONG(LANES))
        with build.goto_entry_block():
            self._scratch = [build.alloca(ir.ArrayType(BYTE, size * LANES)) for size in sizes]
        for scratch in self._scratch:
            scratch.align = 64  # which aligns the stack, and what LLVM puts there
        with build.if_then(self._partial, likely=False):
            self._code.store(ir.Constant(ir.ArrayType(BYTE, sizes[0] * LANES), None), self._scratch[0])
            self._copy(self._scratch[0], places[0], sizes[0])
        self.source, self.packed, self.scales = (
            build.select(self._partial, build.bitcast(scratch, place.type), place)
            for scratch, place in zip(self._scratch, places, strict=True)
        )

    def close(self) -> None:
        """Take what was written to scratch memory to its place."""
        with self._code.build.if_then(self._partial, likely=False):
            for scratch, place, size in list(zip(self._scratch, self._places, self._sizes, strict=True))[1:]:
                self._copy(place, scratch, size)

    def _copy(self, to: Any, source: Any, size: int) -> None:
        build, pointer = self._code.build, BYTE.as_pointer()
        arguments = [
            build.bitcast(to, pointer),
            build.bitcast(source, pointer),
            build.mul(self._left, LONG(size)),
            BIT(0),
        ]
        self._code.intrinsic("llvm.memcpy.p0.p0.i64", VOID, arguments)


def _emit_amax(module: ir.Module, name: str) -> None:
    """Write a function for the magnitudes of many weights: (source, results [n], where each begins [n + 1], n)."""
    largest = _emit_largest(module, name)
    pointer = largest.args[0].type
    function = ir.Function(module, ir.FunctionType(VOID, [pointer, pointer, LONG.as_pointer(), LONG]), name)
    source, results, starts, count = function.args
    code = Code(function, 1)
    with code.loop(LONG(0), count, LONG(1)) as number:
        begin, end = (code.load(code.at(starts, code.build.add(number, LONG(k))), LONG, 8) for k in (0, 1))
        code.build.store(code.build.call(largest, [source, begin, end]), code.at(results, number))
    code.build.ret_void()


def _emit_amax_in_file(module: ir.Module, name: str) -> None:
    """Write a function for the largest magnitude of what lies in a file, part by part, each used while it is in cache.

    Its arguments: (memory for a part, its size, result [1], how much was done [1], file, offset, size), sizes in elements.
    Nothing was done where a part could not be read at once; what is wrong is then for others to find out.
    """
    largest = _emit_largest(module, name)
    pointer, byte = largest.args[0].type, BYTE.as_pointer()
    arguments = [pointer, LONG, pointer, LONG.as_pointer(), WORD, LONG, LONG]
    function = ir.Function(module, ir.FunctionType(VOID, arguments), name)
    memory, room, result, done, file, offset, size = function.args
    code = Code(function, 1)
    build, wide = code.build, LONG(pointer.pointee.width // 8)
    found, left = code.variable(pointer.pointee(0)), code.variable(size)
    with code.loop(LONG(0), left, room) as begin:
        rest = build.sub(size, begin)
        part = build.select(build.icmp_signed("<", rest, room), rest, room)
        place = build.add(offset, build.mul(begin, wide))
        wanted = build.mul(part, wide)
        read = code.intrinsic("pread", LONG, [file, build.bitcast(memory, byte), wanted, place])
        whole = build.icmp_signed("==", read, wanted)
        left.set(build.select(whole, size, LONG(0)))
        held, new = found.get(), build.call(largest, [memory, LONG(0), build.select(whole, part, LONG(0))])
        found.set(build.select(build.icmp_unsigned(">", new, held), new, held))
    build.store(found.get(), result)
    build.store(left.get(), done)
    build.ret_void()


def _emit_largest(module: ir.Module, name: str) -> ir.Function:
    """Write a function that returns the largest magnitude, as bits, of the elements from one index to another."""
    element = HALF if name.endswith("16") else WORD
    pointer, lanes = element.as_pointer(), 64 * 8 // element.width
    function = ir.Function(module, ir.FunctionType(element, [pointer, LONG, LONG]), f"{name}_one")
    function.linkage = "internal"
    source, begin, end = function.args
    code, vector = Code(function, lanes), ir.VectorType(element, lanes)
    mask, build = 2 ** (element.width - 1) - 1, code.build

    def larger(held: Any, bits: Any) -> None:
        found = build.and_(bits, ir.Constant(bits.type, [mask] * lanes if bits.type == vector else mask))
        build.store(build.select(build.icmp_unsigned(">", found, build.load(held)), found, build.load(held)), held)

    wide, single = build.alloca(vector), build.alloca(element)
    build.store(ir.Constant(vector, [0] * lanes), wide)
    build.store(element(0), single)
    whole = build.add(begin, build.and_(build.sub(end, begin), LONG(-lanes)))
    with code.loop(begin, whole, LONG(lanes)) as index:
        larger(wide, code.load(code.at(source, index), vector))
    with code.loop(whole, end, LONG(1)) as index:
        larger(single, code.load(code.at(source, index), element, element.width // 8))
    for lane in range(lanes):
        larger(single, build.extract_element(build.load(wide), WORD(lane)))
    build.ret(build.load(single))
    return function
