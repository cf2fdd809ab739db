"""The instructions that transpose a matrix, and read columns that lie apart in a file.

Called by `transposing.py` for a function that is not in the cache. Square blocks of 16 bytes a side are transposed in
registers, by exchanges that every processor has. Blocks side by side fill whole cache lines of what is written: 5 to 12 GB/s,
where numpy's strided copies come to 0.4 to 2 for wide matrices, 5 for small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from .vector import BYTE, LONG, VOID, WORD, Code

BLOCK_BYTES = 16  # the shortest vector registers
LINE_BYTES = 64


def emit(module: ir.Module, name: str) -> None:
    """Write the function of a name: transpose_16, transpose_32 for values of so many bits, or read_columns."""
    if name == "read_columns":
        _emit_read(module, name)
    else:
        _emit_transpose(module, name)


def _emit_transpose(module: ir.Module, name: str) -> None:
    """Write a function for matrices of a block's rows and a line's columns at least.

    Its arguments: (source, values from one column to the next, out, values from one row to the next, columns, rows). The last
    blocks overlap with those before them.
    """
    element = ir.IntType(int(name.rpartition("_")[2]))
    side, line = (8 * size // element.width for size in (BLOCK_BYTES, LINE_BYTES))
    pointer = element.as_pointer()
    function = ir.Function(module, ir.FunctionType(VOID, [pointer, LONG, pointer, LONG, LONG, LONG]), name)
    source, pitch, out, stride, columns, rows = function.args
    for each in (source, out):
        each.add_attribute("noalias")
    code = Code(function, side)
    build = code.build
    with code.loop(LONG(0), columns, LONG(line)) as far, code.loop(LONG(0), rows, LONG(side)) as down:
        column, row = (_smaller(code, *both) for both in ((far, (columns, line)), (down, (rows, side))))
        begin = code.at(source, build.add(build.mul(column, pitch), row))
        end = code.at(out, build.add(build.mul(row, stride), column))
        for across in range(0, line, side):
            places = [code.at(begin, build.mul(pitch, LONG(across + k))) for k in range(side)]
            block = [code.load(place, code.typed(element), element.width // 8) for place in places]
            for k, values in enumerate(transposed(code, block)):
                place = code.at(end, build.add(build.mul(stride, LONG(k)), LONG(across)))
                code.store(values, place, element.width // 8)
    build.ret_void()


def transposed(code: Code, vectors: Sequence[Any]) -> Sequence[Any]:
    """Return the columns of a square block, given its rows: each step lays the first half of them among the second."""
    count = len(vectors)
    lanes = [lane + other for lane in range(count) for other in (0, count)]
    for _ in range(count.bit_length() - 1):
        pairs = zip(vectors[: count // 2], vectors[count // 2 :], strict=True)
        vectors = [code.shuffle(*pair, half) for pair in pairs for half in (lanes[:count], lanes[count:])]
    return vectors


def _smaller(code: Code, index: Any, end: tuple[Any, int]) -> Any:
    """Return an index, or that of the last block before an end."""
    last = code.build.sub(end[0], LONG(end[1]))
    return code.build.select(code.build.icmp_signed("<", index, last), index, last)


def _emit_read(module: ir.Module, name: str) -> None:
    """Write a function that reads columns one after the other until one cannot be read at once.

    Its arguments: (memory, bytes of a column, columns, how many were read [1], file, offset, bytes from one to the next).
    """
    pointer = BYTE.as_pointer()
    arguments = [pointer, LONG, LONG, LONG.as_pointer(), WORD, LONG, LONG]
    function = ir.Function(module, ir.FunctionType(VOID, arguments), name)
    memory, size, columns, done, file, offset, step = function.args
    code = Code(function, 1)
    build, end = code.build, code.variable(columns)
    code.store(LONG(0), done, 8)
    with code.loop(LONG(0), end, LONG(1)) as column:
        place = code.at(memory, build.mul(column, size))
        found = code.intrinsic("pread", LONG, [file, place, size, build.add(offset, build.mul(column, step))])
        whole = build.icmp_signed("==", found, size)
        code.store(build.add(code.load(done, LONG, 8), build.zext(whole, LONG)), done, 8)
        end.set(build.select(whole, columns, LONG(0)))
    build.ret_void()
