"""The CPU kernel: machine code that LLVM has made of the blocks' arithmetic, called for many weights at once."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..nvfp4 import GROUP_SIZE, ByteArray, Float32Array
from . import BF16, F16, F32, STATISTICS, Float64Array, Int64Array, Kernel, Many, Recipe, Tile, TileStats
from .machine import MachineCode

if TYPE_CHECKING:
    from llvmlite import ir

KINDS = {"H": BF16, "e": F16, "f": F32}  # by numpy's type characters; uint16 stands for bfloat16
_POINTER = ctypes.c_void_p


def _quantizer(module: ir.Module, name: str) -> None:
    from .cpu_code import emit

    emit(module, name)


def _searcher(module: ir.Module, name: str) -> None:
    from .cpu_code import emit_amax

    emit_amax(module, name)


_quantizers = MachineCode(_quantizer, [*[_POINTER] * 6, ctypes.c_int64])
_searchers = MachineCode(_searcher, [_POINTER, _POINTER, _POINTER, ctypes.c_int64])


def address(array: npt.NDArray[Any]) -> int:
    """Return where a C-contiguous array lies; it must be kept until the call ends."""
    place: int = array.__array_interface__["data"][0]
    return place


class CpuKernel(Kernel):
    """Quantizes on the CPU; safe to use from several threads."""

    name = "cpu"
    tile_bytes = 4 * 2**20

    def amax(self, tile: Tile) -> float:
        """Return the largest magnitude; NaN or infinity anywhere in the tile is returned as such."""
        return float(self.amax_each(tile.reshape(-1), np.array([0, tile.size], np.int64))[0])

    def amax_each(self, data: Tile, starts: Int64Array) -> Float32Array:
        """Return the largest magnitude of each weight."""
        bits = np.uint32 if data.dtype.itemsize == 4 else np.uint16
        found = np.empty(len(starts) - 1, bits)
        run = _searchers["amax_32" if bits is np.uint32 else "amax_16"]
        run(address(data), address(found), address(starts), len(found))
        if data.dtype == np.uint16:
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found.view(data.dtype).astype(np.float32)

    def quantize(self, tile: Tile, recipe: Recipe, packed: ByteArray, scales: ByteArray) -> TileStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""
        starts, factor = np.array([0, tile.size], np.int64), np.array([recipe.global_scale], np.float32)
        stats = self.quantize_each(tile.reshape(-1), Many(recipe.method, starts, factor), packed, scales)
        return TileStats.from_array(tile.size, stats[0])

    def quantize_each(self, data: Tile, many: Many, packed: ByteArray, scales: ByteArray) -> Float64Array:
        """Write the packed values and scale codes of many weights, flat; return the statistics `[n, 7]` of each."""
        run = _quantizers[f"{'search' if many.method == 'search' else 'minmax'}_{KINDS[data.dtype.char]}"]
        stats, blocks = np.empty((len(many.global_scales), STATISTICS)), many.starts // GROUP_SIZE
        arrays = (data, packed, scales, stats, blocks, many.global_scales)
        run(*map(address, arrays), len(stats))
        return stats
