"""The arithmetic, fast: one small interface; one program for processors and NVIDIA GPUs, and torch for any device, to the same bytes."""

from __future__ import annotations

import importlib.util
import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from mmap import PAGESIZE
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError, quote
from ..nvfp4 import BLOCK_SIZE, ByteArray, Float32Array
from ..storage.files import read_exact

TileArray = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
ERROR_FIELDS = 7
BF16, F16, F32 = "bf16", "f16", "f32"  # dtypes of weights, as kernels are named


@dataclass(frozen=True, slots=True)
class QuantizeArgs:
    """How to quantize: the method, and the float32 divisor that the fused group shares."""

    method: str
    global_scale: float


@dataclass(slots=True)
class ErrorStats:
    """What quantization did to some weights; sums add up over tiles, `worst_block` is a relative error."""

    weights: int = 0
    squared_error: float = 0.0
    squared_weight: float = 0.0
    rounding_squared_error: float = 0.0
    worst_block: float = 0.0
    zeroed: int = 0
    saturated_blocks: int = 0
    zero_blocks: int = 0

    def add(self, other: ErrorStats) -> None:
        """Take in the statistics of other weights."""
        self.weights += other.weights
        self.squared_error += other.squared_error
        self.squared_weight += other.squared_weight
        self.rounding_squared_error += other.rounding_squared_error
        self.worst_block = max(self.worst_block, other.worst_block)
        self.zeroed += other.zeroed
        self.saturated_blocks += other.saturated_blocks
        self.zero_blocks += other.zero_blocks

    @property
    def relative_error(self) -> float:
        """Relative Frobenius error: norm of the difference over norm of the weights."""
        return float((self.squared_error / self.squared_weight) ** 0.5) if self.squared_weight else 0.0

    @classmethod
    def from_array(cls, weights: int, values: npt.NDArray[np.float64]) -> ErrorStats:
        """Return statistics from a kernel's seven numbers, in the order of the fields after `weights`."""
        error, weight, rounding, worst, zeroed, saturated, zero = values.tolist()
        return cls(weights, error, weight, rounding, worst, int(zeroed), int(saturated), int(zero))

    @classmethod
    def together(cls, weights: int, rows: npt.NDArray[np.float64]) -> ErrorStats:
        """Return the statistics of several weights, `[n, 7]`, as one."""
        values = rows.sum(axis=0)
        values[3] = rows[:, 3].max()
        return cls.from_array(weights, values)

    def as_array(self) -> npt.NDArray[np.float64]:
        """Return what `from_array` takes."""
        return np.array([getattr(self, name) for name in self.__slots__[1:]], np.float64)


@dataclass(frozen=True, slots=True)
class WeightBatch:
    """Weights of one dtype that lie one behind the other, and how to quantize them.

    Weight i has the elements from `starts[i]` to `starts[i + 1]`, a multiple of 16, and the divisor `global_scales[i]`.
    """

    method: str
    starts: Int64Array
    global_scales: Float32Array


class Kernel(ABC):
    """What quantizes tiles: `[R, K]` C-contiguous, K a multiple of 16; uint16 means raw bfloat16 bits."""

    name: str
    tile_bytes: int  # what it takes at once with the least overhead

    def allocate(self, size: int) -> ByteArray:
        """Return `size` bytes of memory that the kernel reads tiles from best; they begin at a page, as direct writes do."""
        memory = np.empty(size + PAGESIZE, np.uint8)
        start = -memory.ctypes.data % PAGESIZE
        return memory[start : start + size]

    @abstractmethod
    def amax(self, tile: TileArray) -> float:
        """Return the largest magnitude; NaN or infinity anywhere in the tile is returned as such."""

    def amax_in_file(self, fd: int, offset: int, tile: TileArray) -> float:
        """Return the largest magnitude of a tile that lies in a file, at `offset` in bytes; its memory is overwritten.

        Raises EOFError if the file ends before, OSError if it cannot be read.
        """
        read_exact(fd, tile.reshape(-1).view(np.uint8).data, offset)
        return self.amax(tile)

    @abstractmethod
    def quantize(self, tile: TileArray, recipe: QuantizeArgs, packed: ByteArray, scales: ByteArray) -> ErrorStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""

    def amax_each(self, data: TileArray, starts: Int64Array) -> Float32Array:
        """Return the largest magnitude of each of many weights, flat; see Many."""
        spans = itertools.pairwise(starts.tolist())
        return np.array([self.amax(data[begin:end].reshape(1, -1)) for begin, end in spans], np.float32)

    def quantize_each(self, data: TileArray, many: WeightBatch, packed: ByteArray, scales: ByteArray) -> Float64Array:
        """Write the packed values and scale codes of many weights, flat; return the statistics `[n, 7]` of each."""
        stats = np.empty((len(many.global_scales), ERROR_FIELDS))
        for row, (begin, end) in enumerate(itertools.pairwise(many.starts.tolist())):
            parts = (packed[begin // 2 : end // 2], scales[begin // BLOCK_SIZE : end // BLOCK_SIZE])
            recipe = QuantizeArgs(many.method, float(many.global_scales[row]))
            found = self.quantize(data[begin:end].reshape(1, -1), recipe, *(part.reshape(1, -1) for part in parts))
            stats[row] = found.as_array()
        return stats


def load_kernel(device: str = "cpu") -> Kernel:
    """Return the kernel for a device: compiled by LLVM for CPUs and CUDA where llvmlite is installed, torch otherwise."""
    family, compiled = device.split(":", maxsplit=1)[0], importlib.util.find_spec("llvmlite") is not None
    if family not in ("cpu", "cuda", "mps", "xpu"):
        raise UsageError(f"device {quote(device)} is unknown, expected cpu, cuda or cuda:N")
    if device == "cpu" and compiled:
        from .cpu import CpuKernel

        return CpuKernel()
    if family == "cuda" and compiled:
        from .cuda import CudaKernel

        return CudaKernel(device)
    from .torch import TorchKernel

    return TorchKernel(device)
