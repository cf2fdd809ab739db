"""Read the bytes of stored tensors, or their values as float32: scales, norms, and parts of an output.

Called where scales are read (`encodings`, `scales`, `planning`) and where an output is looked at; weights go tile by tile into a
worker's own memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..dtypes import NUMPY_DTYPES
from ..nvfp4 import Float32Array, as_float32

if TYPE_CHECKING:
    from .source import Source
    from .weights import StoredTensor, Weight


def read_bytes(source: Source, tensor: StoredTensor | Weight, start: int, size: int) -> npt.NDArray[np.uint8]:
    """Return `size` bytes of a tensor from byte `start` on."""
    buffer = np.empty(size, np.uint8)
    source.read_into(tensor.shard, tensor.offset + start, buffer.data)
    return buffer


def read_float32(source: Source, tensor: StoredTensor) -> Float32Array:
    """Return all values of a tensor in BF16, F16 or F32 as float32, exactly and flat."""
    return as_float32(read_bytes(source, tensor, 0, tensor.info.nbytes).view(NUMPY_DTYPES[tensor.info.dtype]))


def read_scalar(source: Source, tensor: StoredTensor) -> float:
    """Return the float32 that a tensor holds."""
    return float(read_bytes(source, tensor, 0, 4).view(np.float32)[0])
