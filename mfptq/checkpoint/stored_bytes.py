"""Read the bytes of stored tensors, or the number in one.

Called where scales are read (`encodings`) and where an output is looked at; weights go tile by tile into a worker's own memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .source import Source
    from .weights import StoredTensor


def read_bytes(source: Source, tensor: StoredTensor, start: int, size: int) -> npt.NDArray[np.uint8]:
    """Return `size` bytes of a tensor from byte `start` on."""
    buffer = np.empty(size, np.uint8)
    source.read_into(tensor.shard, tensor.offset + start, buffer.data)
    return buffer


def read_scalar(source: Source, tensor: StoredTensor) -> float:
    """Return the float32 that a tensor holds."""
    return float(read_bytes(source, tensor, 0, 4).view(np.float32)[0])
