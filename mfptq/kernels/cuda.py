"""The kernel for NVIDIA GPUs: copies and Triton kernels of several tiles overlap, and memory is bounded.

Every worker thread has a stream and buffers of its own; host memory is pinned. On the device a worker holds one tile and
what it becomes.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
import triton

from ..errors import MemoryBudgetError, UsageError, quote
from ..nvfp4 import GROUP_SIZE, ByteArray
from . import STATISTICS, Recipe, Tile, TileStats
from .triton import minmax, search

LANES = 256
KINDS = {"uint16": 0, "float16": 1, "float32": 2}


class _Lane(threading.local):
    """What one worker thread has on the device: a stream, and buffers that grow to its largest tile."""

    def __init__(self) -> None:
        self.size = 0
        self.stream: Any = None
        self.source: Any = None
        self.packed: Any = None
        self.codes: Any = None
        self.stats: Any = None
        self.sums: Any = None


class TritonKernel:
    """Quantizes on a GPU; safe to use from several threads."""

    tile_bytes = 32 * 2**20  # a launch costs as much of the interpreter's time for any size

    def __init__(self, device: str) -> None:
        try:
            self._device = torch.device(device if ":" in device else f"{device}:0")
            torch.zeros(1, device=self._device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device {quote(device)} cannot be used: {str(error).splitlines()[0]}") from None
        self.name = f"triton-{self._device}"
        self._lane = _Lane()

    def allocate(self, size: int) -> ByteArray:
        """Return pinned host memory, from which copies to the device run beside kernels."""
        buffer: ByteArray = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        return buffer

    def amax(self, tile: Tile) -> float:
        """Return the largest magnitude; NaN or infinity anywhere in the tile is returned as such."""
        lane, wide = self._lane, tile.dtype.itemsize == 4
        self._reserve(tile.nbytes)
        with torch.cuda.device(self._device), torch.cuda.stream(lane.stream):
            source = lane.source[: tile.nbytes]
            source.copy_(_bytes(tile), non_blocking=True)
            words = source.view(torch.int32 if wide else torch.int16)
            largest = int((words & (0x7FFFFFFF if wide else 0x7FFF)).max())
        if tile.dtype == np.uint16:
            return float(np.uint32(largest << 16).view(np.float32))
        return float(np.array([largest], np.uint32 if wide else np.uint16).view(tile.dtype)[0])

    def quantize(self, tile: Tile, recipe: Recipe, packed: ByteArray, scales: ByteArray) -> TileStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite.

        Raises MemoryBudgetError where the device has no memory even for a small tile.
        """
        try:
            return self._run(tile, recipe, packed, scales)
        except torch.OutOfMemoryError:
            if len(tile) == 1:
                raise MemoryBudgetError(f"{self._device} has no memory left: use fewer --max-workers") from None
            self._lane.size, self._lane.source, self._lane.packed = 0, None, None
            torch.cuda.empty_cache()
            half = len(tile) // 2
            stats = self.quantize(tile[:half], recipe, packed[:half], scales[:half])
            stats.add(self.quantize(tile[half:], recipe, packed[half:], scales[half:]))
            return stats

    def _run(self, tile: Tile, recipe: Recipe, packed: ByteArray, scales: ByteArray) -> TileStats:
        lane, blocks = self._lane, scales.size
        programs = triton.cdiv(blocks, LANES)
        self._reserve(tile.nbytes)
        kernel = search if recipe.method == "search" else minmax
        with torch.cuda.device(self._device), torch.cuda.stream(lane.stream):
            source, nibbles = lane.source[: tile.nbytes], lane.packed[: packed.size]
            codes, stats = lane.codes[:blocks], lane.stats[: programs * STATISTICS]
            source.copy_(_bytes(tile), non_blocking=True)
            kernel[(programs,)](
                source.view(torch.int32),
                nibbles.view(torch.int32),
                codes,
                stats,
                blocks,
                recipe.global_scale,
                kind=KINDS[tile.dtype.name],
                lanes=LANES,
                num_warps=8,
                enable_fp_fusion=False,
            )
            _bytes(packed).copy_(nibbles, non_blocking=True)
            _bytes(scales).copy_(codes, non_blocking=True)
            lane.sums[: stats.numel()].copy_(stats, non_blocking=True)
        lane.stream.synchronize()
        return _together(lane.sums[: stats.numel()].numpy().reshape(programs, STATISTICS), tile.size)

    def _reserve(self, size: int) -> None:
        """Have room for a tile of `size` bytes: at least two bytes a weight."""
        lane = self._lane
        if lane.stream is None:
            lane.stream = torch.cuda.Stream(self._device)
        if lane.size < size:
            sums = -(-size // 2 // GROUP_SIZE // LANES) * STATISTICS
            lane.source = torch.empty(size, dtype=torch.uint8, device=self._device)
            lane.packed = torch.empty(size // 4, dtype=torch.uint8, device=self._device)
            lane.codes = torch.empty(size // 2 // GROUP_SIZE, dtype=torch.uint8, device=self._device)
            lane.stats = torch.empty(sums, dtype=torch.float64, device=self._device)
            lane.sums = torch.empty(sums, dtype=torch.float64, pin_memory=True)
            lane.size = size


def _bytes(array: Any) -> torch.Tensor:
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def _together(rows: Any, weights: int) -> TileStats:
    """Return the statistics of all programs."""
    stats = rows.sum(axis=0)
    stats[3] = rows[:, 3].max() ** 0.5
    return TileStats.from_array(weights, stats)
