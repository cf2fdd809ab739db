"""The instructions of the calibrated methods: 16 rows at a time, block by block, since rows share their columns' statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from ..nvfp4 import BLOCK_SIZE
from .blocks import Block, ErrorSums, Quantized, block_words, present, tally
from .calibrated_blocks import Known, calibrated, signed_values
from .compiling import has_fused
from .cpu_code import store_sums, transposed
from .machine import LANES
from .vector import BYTE, DOUBLE, FLOAT, LONG, VOID, WORD, Code


def emit(module: ir.Module, name: str) -> None:
    """Write a function for whole chunks of rows.

    Its arguments: (source, packed, scales, stats, weights, Hessians, lower factors, rows, blocks of a row, global scale).
    """
    method, kind = name.split("_")
    pointers = [element.as_pointer() for element in (WORD, WORD, BYTE, DOUBLE, FLOAT, FLOAT, FLOAT)]
    function = ir.Function(module, ir.FunctionType(VOID, [*pointers, LONG, LONG, FLOAT]), name)
    source, packed, scales, stats, *known, rows, blocks, factor = function.args
    for pointer in function.args[: len(pointers)]:
        pointer.add_attribute("noalias")
    code = Code(function, LANES, fused=has_fused())
    sums, global_scale, words = ErrorSums(code), code.spread(factor), block_words(kind)
    build, stride = code.build, code.build.mul(blocks, LONG(words))
    with code.loop(LONG(0), rows, LONG(LANES)) as row, code.loop(LONG(0), blocks, LONG(1)) as block:
        first = build.add(build.mul(row, blocks), block)
        start = code.at(source, build.mul(first, LONG(words)))
        x = signed_values(transposed(code, start, words, stride), kind)
        sizes = (BLOCK_SIZE, BLOCK_SIZE**2, BLOCK_SIZE**2)
        places = [code.at(each, build.mul(block, LONG(size))) for each, size in zip(known, sizes, strict=True)]
        done = calibrated(x, global_scale, Known(code, *places), method)
        _store_rows(code, done, (packed, scales), [build.add(first, build.mul(blocks, LONG(k))) for k in range(LANES)])
        magnitudes = [(each.bits() & 0x7FFFFFFF).floats() for each in x]
        sums.add(tally(Block(magnitudes, present(magnitudes), ()), done))
    store_sums(code, sums, stats, LONG(0))
    build.ret_void()


def _store_rows(code: Code, done: Quantized, out: Any, places: Sequence[Any]) -> None:
    """Write a block of each of 16 rows at its place, counted in blocks."""
    packed, scales = out
    codes = code.build.trunc(done.code.raw, ir.VectorType(BYTE, LANES))
    low, high = (word.raw for word in done.words)
    for lane, place in enumerate(places):
        both = code.shuffle(low, high, (lane, LANES + lane))
        code.store(both, code.at(packed, code.build.mul(place, LONG(2))), 4)
        code.store(code.build.extract_element(codes, WORD(lane)), code.at(scales, place))
