"""Write and name the CPU's function of FEEDBACK: 16 rows at once, a row to a lane, block after block.

Called by `calibrated_cpu.py`, which calls what is written here as it calls the functions of the other methods.
"""

from __future__ import annotations

import ctypes

from llvmlite import ir

from .blocks import ErrorSums, block_words
from .calibrated import FEEDBACK
from .calibrated_blocks import calibrated_errors, signed_values
from .compiling import CpuFunctions, has_fused
from .cpu_code import LANES, store_rows, store_sums, transposed
from .feedback_blocks import Record, RowSums, with_feedback
from .vector import BYTE, DOUBLE, FLOAT, LONG, VOID, WORD, Code


def emit_feedback(module: ir.Module, name: str) -> None:
    """Write a function for whole chunks of 16 rows (gptq_BF16).

    Its arguments: (source, packed, scales, stats [7], records, rows, blocks of a row, rank, global scale).
    """
    dtype = name.removeprefix(f"{FEEDBACK}_")
    pointers = [element.as_pointer() for element in (WORD, WORD, BYTE, DOUBLE, FLOAT)]
    function = ir.Function(module, ir.FunctionType(VOID, [*pointers, LONG, LONG, LONG, FLOAT]), name)
    source, packed, scales, stats, records, rows, blocks, rank, factor = function.args
    for pointer in function.args[: len(pointers)]:
        pointer.add_attribute("noalias")
    code = Code(function, LANES, fused=has_fused())
    errors, row_sums, global_scale, words = ErrorSums(code), RowSums(code), code.spread(factor), block_words(dtype)
    build, stride = code.build, code.build.mul(blocks, LONG(words))
    with code.loop(LONG(0), rows, LONG(LANES)) as row:
        row_sums.clear(rank)
        with code.loop(LONG(0), blocks, LONG(1)) as turn:
            record = Record.of(code, records, turn, rank)
            first = build.add(build.mul(row, blocks), record.place())
            x = signed_values(transposed(code, code.at(source, build.mul(first, LONG(words))), words, stride), dtype)
            done = with_feedback(x, global_scale, record, row_sums)
            store_rows(
                code, done, (packed, scales), [build.add(first, build.mul(blocks, LONG(k))) for k in range(LANES)]
            )
            errors.add(calibrated_errors(x, done))
    store_sums(code, errors, stats, LONG(0))
    build.ret_void()


feedback_functions = CpuFunctions(
    emit_feedback, [*[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_float]
)
