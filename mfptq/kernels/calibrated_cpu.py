"""The CPU kernel of the calibrated methods: 16 rows at a time, block by block, since rows share their columns' statistics."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir

from ..nvfp4 import GROUP_SIZE, ByteArray
from . import STATISTICS, Recipe, Tile, TileStats
from .blocks import Block, Quantized, Sums, block_words, tally
from .calibrated import Float32Array, Statistics, lower_factors
from .calibrated_blocks import Known, calibrated, signed_values
from .cpu import KINDS, address, store_sums, transposed
from .machine import LANES, MachineCode, has_fused
from .vector import BYTE, DOUBLE, FLOAT, LONG, VOID, WORD, Code

_NAMES = {"weighted": "weighted", "hessian": "hessian", "hessian+": "descent"}


def _emit(module: ir.Module, name: str) -> None:
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
    sums, global_scale, words = Sums(code), code.spread(factor), block_words(kind)
    build, stride = code.build, code.build.mul(blocks, LONG(words))
    with code.loop(LONG(0), rows, LONG(LANES)) as row, code.loop(LONG(0), blocks, LONG(1)) as block:
        first = build.add(build.mul(row, blocks), block)
        start = code.at(source, build.mul(first, LONG(words)))
        x = signed_values(transposed(code, start, words, stride), kind)
        sizes = (GROUP_SIZE, GROUP_SIZE**2, GROUP_SIZE**2)
        places = [code.at(each, build.mul(block, LONG(size))) for each, size in zip(known, sizes, strict=True)]
        done = calibrated(x, global_scale, Known(code, *places), method)
        _store_rows(code, done, (packed, scales), [build.add(first, build.mul(blocks, LONG(k))) for k in range(LANES)])
        sums.add(tally(Block([(each.bits() & 0x7FFFFFFF).floats() for each in x], ()), done))
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


_quantizers = MachineCode(_emit, [*[ctypes.c_void_p] * 7, ctypes.c_int64, ctypes.c_int64, ctypes.c_float])


class CalibratedCpuKernel:
    """Quantizes on the CPU; safe to use from several threads."""

    name = "cpu"

    def quantize(
        self, tile: Tile, recipe: Recipe, statistics: Statistics, *, packed: ByteArray, scales: ByteArray
    ) -> TileStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""
        run = _quantizers[f"{_NAMES[recipe.method]}_{KINDS[tile.dtype.char]}"]
        known = _known(statistics.values)
        places = [address(each) for each in known]
        found = TileStats()
        whole = len(tile) // LANES * LANES
        if whole:
            stats = np.empty(STATISTICS)
            arrays = (tile, packed, scales, stats)
            run(*map(address, arrays), *places, whole, scales.shape[1], recipe.global_scale)
            found.add(TileStats.from_array(whole * tile.shape[1], stats))
        if whole < len(tile):
            left, stats = len(tile) - whole, np.empty(STATISTICS)
            rows, nibbles, codes = (np.zeros((LANES, each.shape[1]), each.dtype) for each in (tile, packed, scales))
            rows[:left] = tile[whole:]
            arrays = (rows, nibbles, codes, stats)
            run(*map(address, arrays), *places, LANES, scales.shape[1], recipe.global_scale)
            packed[whole:], scales[whole:] = nibbles[:left], codes[:left]
            stats[-1] -= (LANES - left) * scales.shape[1]
            found.add(TileStats.from_array(left * tile.shape[1], stats))
        return found


def _known(values: Float32Array) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Return weights, Hessians, and their lower factors, all contiguous; what a method does not need is empty."""
    values, empty = np.ascontiguousarray(values), np.empty(0, np.float32)
    if values.ndim == 1:
        return values, empty, empty
    return empty, values, lower_factors(values)
