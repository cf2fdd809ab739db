"""The kernels' interface: quantize tiles on a processor or an NVIDIA GPU, to the same bytes.

The execution calls `load_kernel` once and shares the kernel among its threads. A kernel never decides anything: method and
global scale come with each call. docs/kernels.md explains the layers below.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from mmap import PAGESIZE
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError, quote
from ..nvfp4 import BLOCK_SIZE, ByteArray, Float32Array
from ..storage.files import read_exact
from .stats import ERROR_FIELDS, ErrorStats

if TYPE_CHECKING:
    from ..checkpoint.encoding import CodeScaler
    from ..fp8 import Segments
    from .calibrated import PreparedStatistics

__all__ = [
    "ERROR_FIELDS", "ErrorStats", "Float64Array", "Int64Array", "Kernel", "QuantizeArgs", "TileArray", "WeightBatch",
    "load_kernel",
]  # fmt: skip

TileArray = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class QuantizeArgs:
    """How to quantize: the method, and the float32 global scale that the fused group shares.

    `statistics` are those of the inputs, which the calibrated methods need, and no other.
    """

    method: str
    global_scale: float
    statistics: PreparedStatistics | None = None


@dataclass(frozen=True, slots=True)
class WeightBatch:
    """Weights of one dtype that lie one behind the other, and how to quantize them.

    Weight i has the elements from `starts[i]` to `starts[i + 1]`, a multiple of 16, and the global scale `global_scales[i]`.
    """

    method: str
    starts: Int64Array
    global_scales: Float32Array


class Kernel(ABC):
    """What quantizes tiles: `[R, K]` C-contiguous, K a multiple of 16; uint16 means raw bfloat16 bits."""

    name: str
    tile_bytes: int  # what it takes at once with the least overhead

    def allocate(self, size: int) -> ByteArray:
        """Return `size` bytes of memory that the kernel reads tiles from best; they begin at a page, so no vector lies in two."""
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
    def quantize(self, tile: TileArray, args: QuantizeArgs, packed: ByteArray, scales: ByteArray) -> ErrorStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite."""

    def amax_each(self, data: TileArray, starts: Int64Array) -> Float32Array:
        """Return the largest magnitude of each of many weights, flat; see WeightBatch."""
        spans = itertools.pairwise(starts.tolist())
        return np.array([self.amax(data[begin:end].reshape(1, -1)) for begin, end in spans], np.float32)

    @property
    def decoder(self) -> CodeScaler:
        """What decodes stored codes for this kernel."""
        from .decode import load_decoder

        return load_decoder()

    def quantize_segments(
        self, data: TileArray, segments: Segments, codes: ByteArray
    ) -> tuple[Float32Array, ErrorStats]:
        """Write E4M3 codes of flat finite values; return the scales that were taken, `[n]`, and what it cost.

        `codes` may be the first bytes of `data` itself.
        """
        from .fp8 import quantize_fp8

        return quantize_fp8(data, segments, codes)

    def quantize_each(self, data: TileArray, batch: WeightBatch, packed: ByteArray, scales: ByteArray) -> Float64Array:
        """Write the packed values and scale codes of many weights, flat; return the statistics `[n, 7]` of each."""
        stats = np.empty((len(batch.global_scales), ERROR_FIELDS))
        for row, (begin, end) in enumerate(itertools.pairwise(batch.starts.tolist())):
            parts = (packed[begin // 2 : end // 2], scales[begin // BLOCK_SIZE : end // BLOCK_SIZE])
            args = QuantizeArgs(batch.method, float(batch.global_scales[row]))
            found = self.quantize(data[begin:end].reshape(1, -1), args, *(part.reshape(1, -1) for part in parts))
            stats[row] = found.as_array()
        return stats


def load_kernel(device: str = "cpu") -> Kernel:
    """Return the kernel for a device: cpu, cuda or cuda:N; raises UsageError for others and where it cannot be used."""
    match back_end(device):
        case "cuda":
            from .cuda import CudaKernel

            return CudaKernel(device)
        case "cpu":
            from .cpu import CpuKernel

            return CpuKernel()
    require_torch()
    from .calibrated_torch import CalibratedTorchKernel

    return CalibratedTorchKernel()


def back_end(device: str) -> str:
    """Return what computes for a device, cuda, cpu or torch; raises UsageError as `is_cuda` does."""
    if is_cuda(device):
        return "cuda"
    return "cpu" if has_compiler() else "torch"


def require_torch() -> None:
    """Raise UsageError, with the line that installs it, if there is no torch, which computes where llvmlite is missing."""
    try:
        importlib.import_module("torch")
    except ModuleNotFoundError:
        raise UsageError(
            "without llvmlite the kernels need torch, which is missing too: pip install 'mfptq[torch]'"
        ) from None


def has_compiler() -> bool:
    """Return whether llvmlite is installed, without loading it: elsewhere than on CPython it is not."""
    return importlib.util.find_spec("llvmlite") is not None


def is_cuda(device: str) -> bool:
    """Return whether a device is a GPU and not the CPU; raises UsageError for what is neither, or needs llvmlite."""
    if device == "cpu":
        return False
    if re.fullmatch("cuda(:[0-9]{1,4})?", device) is None:
        raise UsageError(f"device {quote(device)} is unknown, expected cpu, cuda, cuda:N or auto")
    if not has_compiler():  # eager torch takes minutes there where the CPU takes seconds
        raise UsageError(f"device {quote(device)} needs llvmlite: install it, or use cpu")
    return True
