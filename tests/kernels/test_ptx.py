"""The functions for GPUs that take FP8 and decode codes, run on a processor as a grid of one thread: what they compute is right."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
from llvmlite import binding, ir

from mfptq import fp8
from mfptq.encodings.codes import CODE_FORMATS, scale_codes
from mfptq.fp8 import Segments, minmax_scales, search_scales
from mfptq.kernels import compiling
from mfptq.kernels.fp8 import quantize_fp8
from mfptq.kernels.fp8_ptx import emit_decode, emit_fp8

ONE_THREAD = {"tid.x": 0, "ctaid.x": 0, "ntid.x": 32, "nctaid.x": 1}


def as_thread(name: str, emit: object) -> object:
    """Return a GPU's function as one for this processor, of the first of 32 threads, whose neighbours have found nothing.

    Of the things that it shares out, such a thread takes every thirty-second.
    """
    module = ir.Module(name)
    emit(module, name)
    text = str(module).replace(" addrspace(1)", "").replace("ptx_kernel ", "").replace(name, f"{name}_thread")
    text = re.sub(r"declare [^\n]*@\"llvm\.nvvm\.[^\n]*\n", "", text)
    for register, value in ONE_THREAD.items():
        text += f'\ndefine i32 @"sreg.{register}"() {{ ret i32 {value} }}'
    text += '\ndefine i32 @"shuffled"(i32 %a, i32 %b, i32 %c, i32 %d) { ret i32 0 }\n'
    text = text.replace("llvm.nvvm.read.ptx.sreg.", "sreg.").replace("llvm.nvvm.shfl.sync.bfly.i32", "shuffled")
    engine = compiling._engine()
    engine.add_module(binding.parse_assembly(text))
    engine.finalize_object()
    pointers, sizes = (6, 1) if "fp8" in name else (3, 3)
    types = [*[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * sizes]
    return ctypes.CFUNCTYPE(None, *types)(engine.get_function_address(f"{name}_thread"))


def addresses(*arrays: np.ndarray) -> list[int]:
    return [array.__array_interface__["data"][0] for array in arrays]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_fp8(dtype: str, exact: bool) -> None:
    rng = np.random.default_rng(4)
    values = (rng.standard_normal((33, 80)) * np.exp2(rng.integers(-9, 9, (33, 1)))).astype(np.float32)
    values[32, :40] = 0
    data = {"BF16": (values.view(np.uint32) >> 16).astype(np.uint16), "F16": values.astype(np.float16), "F32": values}[
        dtype
    ]
    data = data.reshape(-1)
    starts = np.arange(0, data.size + 1, 80, dtype=np.int64)
    amax = np.abs(fp8.as_float32(data)).reshape(33, 80).max(1)
    theirs = minmax_scales(amax, dtype)
    segments = Segments(starts, theirs if exact else search_scales(amax), theirs, exact)
    expected = np.empty(data.size, np.uint8)
    chosen, _ = quantize_fp8(data, segments, expected)
    codes, scales, stats = np.full(data.size, 0xEE, np.uint8), segments.scales.copy(), np.zeros(7)
    run = as_thread(f"fp8_{'exact_' if exact else ''}{dtype}", emit_fp8)
    run(*addresses(data, codes, stats, starts, scales, segments.others), 33)
    mine = [0, 32]  # of the first thread of 32
    assert np.array_equal(scales[mine], chosen[mine])
    assert np.array_equal(codes.reshape(33, 80)[mine], expected.reshape(33, 80)[mine])
    assert (np.delete(codes.reshape(33, 80), mine, axis=0) == 0xEE).all()
    alone = np.concatenate([data.reshape(33, 80)[row] for row in mine])
    part = Segments(starts[:3], segments.scales[mine], segments.others[mine], exact)
    _, known = quantize_fp8(alone, part, np.empty(160, np.uint8))
    found = np.array([*stats[:3], np.sqrt(stats[3]), *stats[4:]])
    assert np.allclose(found, known.as_array(), rtol=1e-12)


@pytest.mark.parametrize("codes", CODE_FORMATS)
def test_decode(codes: str) -> None:
    rng, rows, columns, run = np.random.default_rng(5), 6, 48, 32
    bits = CODE_FORMATS[codes].bits
    packed = rng.integers(0, 256, rows * columns * bits // 8).astype(np.uint8)
    scales = np.exp2(rng.integers(-140, 9, (rows, 2))).astype(np.float32)
    expected, found = (np.zeros((rows, columns), np.uint16) for _ in range(2))
    scale_codes(codes, packed, scales, expected, run=run)
    as_thread(f"decode_{codes}", emit_decode)(*addresses(packed, scales, found), rows * columns, columns, run)
    assert np.array_equal(found.reshape(-1)[::32], expected.reshape(-1)[::32])
    assert not np.delete(found.reshape(-1), np.s_[::32]).any()
