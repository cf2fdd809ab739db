"""The kernel for NVIDIA GPUs: copies and Triton kernels of several tiles overlap, and memory is bounded.

Every worker thread has a stream and buffers of its own; host memory is pinned. On the device a worker holds one tile and
twice what it becomes.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
import triton

from ..errors import MemoryBudgetError, UsageError, quote
from ..nvfp4 import ByteArray
from . import STATISTICS, Recipe, Tile, TileStats, load_kernel
from .triton import minmax, search

LANES = 256
KINDS = {"uint16": 0, "float16": 1, "float32": 2}


class _Lane(threading.local):
    """What one worker thread has on the device: a stream, and buffers that grow to its largest tile."""

    def __init__(self) -> None:
        self.size = 0
        self.stream: Any = None
        self.source: Any = None
        self.result: Any = None
        self.back: Any = None


class TritonKernel:
    """Quantizes on a GPU; safe to use from several threads. Largest magnitudes are found on the CPU, while reading."""

    def __init__(self, device: str) -> None:
        try:
            self._device = torch.device(device if ":" in device else f"{device}:0")
            torch.zeros(1, device=self._device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device {quote(device)} cannot be used: {str(error).splitlines()[0]}") from None
        self.name = f"triton-{self._device}"
        self._host = load_kernel("cpu")
        self._lane = _Lane()

    def allocate(self, size: int) -> ByteArray:
        """Return pinned host memory, from which copies to the device run beside kernels."""
        buffer: ByteArray = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        return buffer

    def amax(self, tile: Tile) -> float:
        """Return the largest magnitude; NaN or infinity anywhere in the tile is returned as such."""
        return self._host.amax(tile)

    def quantize(self, tile: Tile, recipe: Recipe, packed: ByteArray, scales: ByteArray) -> TileStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite.

        Raises MemoryBudgetError where the device has no memory even for a small tile.
        """
        try:
            return self._run(tile, recipe, packed, scales)
        except torch.OutOfMemoryError:
            if len(tile) == 1:
                raise MemoryBudgetError(f"{self._device} has no memory left: use fewer --max-workers") from None
            self._lane.size, self._lane.source, self._lane.result = 0, None, None
            torch.cuda.empty_cache()
            half = len(tile) // 2
            stats = self.quantize(tile[:half], recipe, packed[:half], scales[:half])
            stats.add(self.quantize(tile[half:], recipe, packed[half:], scales[half:]))
            return stats

    def _run(self, tile: Tile, recipe: Recipe, packed: ByteArray, scales: ByteArray) -> TileStats:
        lane, blocks = self._lane, scales.size
        programs = triton.cdiv(blocks, LANES)
        self._reserve(tile.nbytes, packed.size + scales.size + programs * STATISTICS * 8)
        kernel = search if recipe.method == "search" else minmax
        with torch.cuda.device(self._device), torch.cuda.stream(lane.stream):
            source = lane.source[: tile.nbytes]
            source.copy_(torch.from_numpy(tile.reshape(-1).view(np.uint8)), non_blocking=True)
            stats, nibbles, codes = _split(lane.result, (programs * STATISTICS * 8, packed.size, scales.size))
            kernel[(programs,)](
                source.view(torch.int32),
                nibbles.view(torch.int32),
                codes,
                stats.view(torch.float64),
                blocks,
                recipe.global_scale,
                kind=KINDS[tile.dtype.name],
                lanes=LANES,
                num_warps=8,
                enable_fp_fusion=False,
            )
            used = stats.numel() + packed.size + scales.size
            lane.back[:used].copy_(lane.result[:used], non_blocking=True)
        lane.stream.synchronize()
        return _take(lane.back.numpy(), programs, tile.size, packed, scales)

    def _reserve(self, source: int, result: int) -> None:
        lane = self._lane
        if lane.stream is None:
            lane.stream = torch.cuda.Stream(self._device)
        if lane.size < source:
            lane.source = torch.empty(source, dtype=torch.uint8, device=self._device)
            lane.result = torch.empty(2 * result, dtype=torch.uint8, device=self._device)
            lane.back = torch.empty(2 * result, dtype=torch.uint8, pin_memory=True)
            lane.size = source


def _split(buffer: torch.Tensor, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Return consecutive parts of a buffer."""
    parts, start = [], 0
    for size in sizes:
        parts.append(buffer[start : start + size])
        start += size
    return parts


def _take(result: ByteArray, programs: int, weights: int, packed: ByteArray, scales: ByteArray) -> TileStats:
    """Copy out what came back from the device, and return the statistics of all programs together."""
    start = programs * STATISTICS * 8
    packed.reshape(-1)[:] = result[start : start + packed.size]
    scales.reshape(-1)[:] = result[start + packed.size : start + packed.size + scales.size]
    rows = result[:start].view(np.float64).reshape(programs, STATISTICS)
    stats = rows.sum(axis=0)
    stats[3] = rows[:, 3].max() ** 0.5
    return TileStats.from_array(weights, stats)
