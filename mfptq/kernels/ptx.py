"""Write the GPU's functions as PTX: the same arithmetic as the CPU's, one block of 16 to a thread.

Called by `cuda.py` for a function that is not in the cache. PTX for compute capability 7.0 runs on every later GPU; the driver
translates it, and keeps what it made. Instructions round as IEEE 754 says and are never contracted (`mul.rn`, `add.rn`,
`div.rn`): the bytes must be the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir

from ..nvfp4 import BLOCK_SIZE
from .blocks import (
    ErrorSums,
    QuantizedBlock,
    block_errors,
    block_words,
    minmax,
    search,
    unpack_block,
)
from .calibrated import FEEDBACK, FUNCTIONS
from .calibrated_blocks import ColumnStatistics, calibrated, calibrated_errors, signed_values
from .compiling import optimized
from .feedback_blocks import Record, RowSums, with_feedback
from .fp8_ptx import emit_decode, emit_fp8
from .ptx_threads import GLOBAL, WARP, kernel, larger, over_warp, register, store_over_warps, thread_numbers
from .stats import WORST
from .vector import BYTE, DOUBLE, FLOAT, LONG, WORD, Code, Words

_OF_CODES = {"fp8": emit_fp8, "decode": emit_decode}
_TRIPLE = "nvptx64-nvidia-cuda"
_MODEL, _FEATURES = "sm_70", "+ptx60"


def compile_ptx(name: str) -> bytes:
    """Return the PTX of a function by its name: of a method and a dtype (search_BF16), or of a width in bits (amax_16).

    `search`, `minmax`: (source, packed, scales, stats, blocks, global scale), with stats float64 [7, W]: column w is what
    warp w of the grid found. Calibrated methods: (source, packed, scales, stats, statistics, blocks, blocks of a row, which
    of those the first one is, global scale); FEEDBACK, whose threads take whole rows, has the rank of the factors in place of
    that. `fp8` and `decode`: see `fp8_ptx.py`. `amax`: (source, words, result), where the result, to be zero before, becomes
    the largest magnitude's bits.
    """
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple(_TRIPLE).create_target_machine(cpu=_MODEL, features=_FEATURES, opt=3)
    module = ir.Module(name)
    module.triple, module.data_layout = _TRIPLE, str(target.target_data)
    method, _, what = name.partition("_")
    if method == "amax":
        _emit_amax(module, int(what))
    elif method in _OF_CODES:
        _OF_CODES[method](module, name)
    else:
        _emitter(method)(module, method, what)
    text: str = target.emit_assembly(optimized(module, target))
    return text.encode()


def _emitter(method: str) -> Callable[[ir.Module, str, str], None]:
    if method == FEEDBACK:
        return _emit_feedback
    return _emit_calibrated if method in FUNCTIONS.values() else _emit


def _emit(module: ir.Module, method: str, dtype: str) -> None:
    pointers = [element.as_pointer(GLOBAL) for element in (WORD, WORD, BYTE, DOUBLE)]
    code = kernel(module, f"{method}_{dtype}", [*pointers, LONG, FLOAT])
    source, packed, scales, stats, blocks, factor = code.function.args
    number, threads = thread_numbers(code)
    global_scale = code.spread(factor)
    with _error_sums(code, stats) as sums, code.loop(number, blocks, threads) as place:
        found = unpack_block(_loaded(code, source, place, block_words(dtype)), dtype)
        done = search(code, found, global_scale) if method == "search" else minmax(code, found, global_scale, dtype)
        _store(code, done, (packed, scales), place)
        sums.add(block_errors(found, done))


def _emit_calibrated(module: ir.Module, method: str, dtype: str) -> None:
    """Write the function of a calibrated method: threads side by side take rows one below the other, of the same columns.

    So they read the same statistics, at the same time. Number n stands for a row and a column of blocks: n % rows, n // rows.
    """
    pointers = [element.as_pointer(GLOBAL) for element in (WORD, WORD, BYTE, DOUBLE, FLOAT)]
    code = kernel(module, f"{method}_{dtype}", [*pointers, LONG, LONG, LONG, FLOAT])
    source, packed, scales, stats, known, blocks, width, first, factor = code.function.args
    build, size = code.build, BLOCK_SIZE if method == "weighted" else BLOCK_SIZE**2
    number, threads = thread_numbers(code)
    global_scale = code.spread(factor)
    rows = build.udiv(build.sub(build.add(blocks, width), LONG(1)), width)
    with _error_sums(code, stats) as sums, code.loop(number, build.mul(rows, width), threads) as index:
        place = build.add(build.mul(build.urem(index, rows), width), build.udiv(index, rows))
        with build.if_then(build.icmp_unsigned("<", place, blocks)):  # the last row may be short
            column = build.urem(build.add(place, first), width)
            statistics = ColumnStatistics(code, code.at(known, build.mul(column, LONG(size))))
            x = signed_values(_loaded(code, source, place, block_words(dtype)), dtype)
            done = calibrated(x, global_scale, statistics, method)
            _store(code, done, (packed, scales), place)
            sums.add(calibrated_errors(x, done))


def _emit_feedback(module: ir.Module, method: str, dtype: str) -> None:
    """Write the function of FEEDBACK: a thread takes a row, block after block, and all of them the same block at a time."""
    pointers = [element.as_pointer(GLOBAL) for element in (WORD, WORD, BYTE, DOUBLE, FLOAT)]
    code = kernel(module, f"{method}_{dtype}", [*pointers, LONG, LONG, LONG, FLOAT])
    source, packed, scales, stats, records, blocks, width, rank, factor = code.function.args
    build, (number, threads), row_sums = code.build, thread_numbers(code), RowSums(code)
    global_scale = code.spread(factor)
    with _error_sums(code, stats) as sums, code.loop(number, build.udiv(blocks, width), threads) as row:
        row_sums.clear(rank)
        with code.loop(LONG(0), width, LONG(1)) as turn:
            record = Record.of(code, records, turn, rank)
            place = build.add(build.mul(row, width), record.place())
            x = signed_values(_loaded(code, source, place, block_words(dtype)), dtype)
            done = with_feedback(x, global_scale, record, row_sums)
            _store(code, done, (packed, scales), place)
            sums.add(calibrated_errors(x, done))


def _store(code: Code, done: QuantizedBlock, out: Any, place: Any) -> None:
    packed, scales = out
    both = ir.Constant(ir.VectorType(WORD, 2), ir.Undefined)
    for half, word in enumerate(done.words):
        both = code.build.insert_element(both, word.raw, WORD(half))
    code.store(both, code.at(packed, code.build.mul(place, LONG(2))), 8)
    code.store(code.build.trunc(done.code.raw, BYTE), code.at(scales, place))


@contextmanager
def _error_sums(code: Code, stats: Any) -> Iterator[ErrorSums]:
    """Yield a thread's error statistics; write each warp's at the end, and return from the kernel."""
    build, sums = code.build, ErrorSums(code)
    yield sums
    for row, value in enumerate(sums.doubles()):
        store_over_warps(code, (stats, row), value, larger(code) if row == WORST else build.fadd)
    build.ret_void()


def _loaded(code: Code, source: Any, block: Any, words: int) -> list[Words]:
    """Load a block, 16 bytes at a time."""
    start, result = code.at(source, code.build.mul(block, LONG(words))), []
    for place in range(0, words, 4):
        four = code.load(code.at(start, LONG(place)), ir.VectorType(WORD, 4), 16)
        result += [Words(code, code.build.extract_element(four, WORD(i))) for i in range(4)]
    return result


def _emit_amax(module: ir.Module, bits: int) -> None:
    pointer = WORD.as_pointer(GLOBAL)
    code = kernel(module, f"amax_{bits}", [pointer, LONG, pointer])
    source, count, result = code.function.args
    build = code.build
    number, threads = thread_numbers(code)
    largest = code.variable(code.words(0))
    with code.loop(number, count, threads) as index:
        word = Words(code, code.load(code.at(source, index), WORD, 4))
        parts = [word & 0x7FFFFFFF] if bits == 32 else [word & 0x7FFF, (word >> 16) & 0x7FFF]
        for part in parts:
            largest.set(part.maximum(largest.get()))
    found = over_warp(code, largest.get().raw, lambda a, b: build.select(build.icmp_unsigned(">", a, b), a, b))
    first = build.icmp_unsigned("==", build.and_(register(code, "tid.x"), WORD(WARP - 1)), WORD(0))
    with build.if_then(first):
        build.atomic_rmw("umax", result, found, "monotonic")
    build.ret_void()
