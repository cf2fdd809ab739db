"""The CPU kernel: LLVM vectors of 16 blocks, one to a lane, in one function for each method and dtype.

The blocks of a chunk lie one behind the other; transposed, word j of every block is one vector. 16 lanes on every machine:
where registers are shorter, LLVM takes several, and sums over lanes come out the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from ..nvfp4 import GROUP_SIZE, ByteArray
from . import STATISTICS, Recipe, Tile, TileStats
from .blocks import BF16, F16, F32, WORST, Quantized, Sums, block_words, minmax, search, tally, unpack_block
from .machine import LANES, MachineCode, has_fused
from .vector import BYTE, DOUBLE, FLOAT, HALF, LONG, VOID, WORD, Code, Words

KINDS = {"H": BF16, "e": F16, "f": F32}  # by numpy's type characters; uint16 stands for bfloat16
_POINTER = ctypes.c_void_p


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


def store_sums(code: Code, sums: Sums, stats: Any) -> None:
    """Write the statistics of all lanes together: sums in the order of lanes, and the worst relative error."""
    build, values = code.build, sums.doubles()
    for place, vector in enumerate(values):
        total, *others = [build.extract_element(vector, WORD(lane)) for lane in range(LANES)]
        for lane in others:
            larger = build.fcmp_ordered(">", lane, total)
            total = build.select(larger, lane, total) if place == WORST else build.fadd(total, lane)
        if place == WORST:
            total = code.intrinsic("llvm.sqrt.f64", DOUBLE, [total])
        code.store(total, code.at(stats, LONG(place)))


def store_chunk(code: Code, done: Quantized, packed: Any, scales: Any) -> None:
    """Write 16 blocks one behind the other: two words each, and one byte each."""
    low, high = (word.raw for word in done.words)
    for half in (0, 1):
        mask = [half * 8 + lane // 2 + LANES * (lane % 2) for lane in range(LANES)]
        code.store(code.shuffle(low, high, mask), code.at(packed, LONG(half * LANES)))
    code.store(code.build.trunc(done.code.raw, ir.VectorType(BYTE, LANES)), scales)


def _emit(module: ir.Module, name: str) -> None:
    """Write a function for whole chunks: (source, packed, scales, stats, blocks, global scale)."""
    method, kind = name.split("_")
    pointers = [element.as_pointer() for element in (WORD, WORD, BYTE, DOUBLE)]
    function = ir.Function(module, ir.FunctionType(VOID, [*pointers, LONG, FLOAT]), name)
    source, packed, scales, stats, blocks, factor = function.args
    for pointer in (source, packed, scales, stats):
        pointer.add_attribute("noalias")
    code = Code(function, LANES, fused=has_fused())
    sums, global_scale, words = Sums(code), code.spread(factor), block_words(kind)
    with code.loop(LONG(0), blocks, LONG(LANES)) as block:
        start = code.at(source, code.build.mul(block, LONG(words)))
        chunk = unpack_block(transposed(code, start, words), kind)
        done = search(code, chunk, global_scale) if method == "search" else minmax(code, chunk, global_scale, kind)
        store_chunk(code, done, code.at(packed, code.build.mul(block, LONG(2))), code.at(scales, block))
        sums.add(tally(chunk, done))
    store_sums(code, sums, stats)
    code.build.ret_void()


def _emit_amax(module: ir.Module, name: str) -> None:
    """Write a function for any number of magnitudes of 16 or 32 bits: (source, result, how many)."""
    element = HALF if name.endswith("16") else WORD
    pointer, lanes = element.as_pointer(), 64 * 8 // element.width
    function = ir.Function(module, ir.FunctionType(VOID, [pointer, pointer, LONG]), name)
    source, result, count = function.args
    code, vector = Code(function, lanes), ir.VectorType(element, lanes)
    mask, build = 2 ** (element.width - 1) - 1, code.build

    def larger(held: Any, bits: Any) -> None:
        found = build.and_(bits, ir.Constant(bits.type, [mask] * lanes if bits.type == vector else mask))
        build.store(build.select(build.icmp_unsigned(">", found, build.load(held)), found, build.load(held)), held)

    wide, single = build.alloca(vector), build.alloca(element)
    build.store(ir.Constant(vector, [0] * lanes), wide)
    build.store(element(0), single)
    whole = build.and_(count, LONG(-lanes))
    with code.loop(LONG(0), whole, LONG(lanes)) as index:
        larger(wide, code.load(code.at(source, index), vector))
    with code.loop(whole, count, LONG(1)) as index:
        larger(single, code.load(code.at(source, index), element, element.width // 8))
    for lane in range(lanes):
        larger(single, build.extract_element(build.load(wide), WORD(lane)))
    build.store(build.load(single), result)
    build.ret_void()


_quantizers = MachineCode(_emit, [*[_POINTER] * 4, ctypes.c_int64, ctypes.c_float])
_searchers = MachineCode(_emit_amax, [_POINTER, _POINTER, ctypes.c_int64])


def address(array: npt.NDArray[Any]) -> int:
    """Return where a C-contiguous array lies; it must be kept until the call ends."""
    place: int = array.__array_interface__["data"][0]
    return place


class CpuKernel:
    """Quantizes on the CPU; safe to use from several threads."""

    name = "cpu"
    tile_bytes = 4 * 2**20

    def allocate(self, size: int) -> ByteArray:
        """Return `size` bytes of memory."""
        return np.empty(size, np.uint8)

    def amax(self, tile: Tile) -> float:
        """Return the largest magnitude; NaN or infinity anywhere in the tile is returned as such."""
        bits = np.uint32 if tile.dtype.itemsize == 4 else np.uint16
        found = np.empty(1, bits)
        _searchers["amax_32" if bits is np.uint32 else "amax_16"](address(tile), address(found), tile.size)
        if tile.dtype == np.uint16:
            return float((found.astype(np.uint32) << 16).view(np.float32)[0])
        return float(found.view(tile.dtype)[0])

    def quantize(self, tile: Tile, recipe: Recipe, packed: ByteArray, scales: ByteArray) -> TileStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""
        run = _quantizers[f"{'search' if recipe.method == 'search' else 'minmax'}_{KINDS[tile.dtype.char]}"]
        whole = scales.size // LANES * LANES
        stats = np.empty(STATISTICS)
        run(address(tile), address(packed), address(scales), address(stats), whole, recipe.global_scale)
        found = TileStats.from_array(whole * GROUP_SIZE, stats)
        if whole < scales.size:
            found.add(_last_blocks(run, (tile.reshape(-1), packed.reshape(-1), scales.reshape(-1)), whole, recipe))
        return found


def _last_blocks(run: Any, arrays: Sequence[npt.NDArray[Any]], whole: int, recipe: Recipe) -> TileStats:
    """Quantize what is left after whole chunks, as a chunk filled up with zeros."""
    tile, packed, scales = arrays
    left = scales.size - whole
    source = np.zeros(LANES * GROUP_SIZE, tile.dtype)
    source[: left * GROUP_SIZE] = tile[whole * GROUP_SIZE :]
    codes, nibbles, stats = np.empty(LANES, np.uint8), np.empty(LANES * 8, np.uint8), np.empty(STATISTICS)
    run(address(source), address(nibbles), address(codes), address(stats), LANES, recipe.global_scale)
    packed[whole * 8 :], scales[whole:] = nibbles[: left * 8], codes[:left]
    stats[-1] -= LANES - left
    return TileStats.from_array(left * GROUP_SIZE, stats)
