"""Turn columns into rows, and read columns from a file: compiled where LLVM is installed, else by numpy.

Called by `execution.turned`, for matrices that are stored transposed.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..kernels import TileArray
from ..nvfp4 import ByteArray
from ..storage.files import read_strided

if TYPE_CHECKING:
    from llvmlite import ir

_AT_ONCE = 64  # columns of a block: what is written of a row fills whole cache lines
_ROWS = 512  # of a block, which then fits into the processor's nearest caches
_PADDING = 32  # values behind each column: powers of two apart, columns would push each other out of the cache


class Turner(Protocol):
    """Turns columns into rows; safe to use from several threads."""

    def turn(self, columns: TileArray, out: TileArray) -> None:
        """Write `columns` `[C, R]` to `out` `[R, C]`; the values of a column, and of a row, follow each other."""

    def read(self, fd: int, columns: ByteArray, offset: int, step: int) -> None:
        """Fill each row of `columns`, bytes `[C, size]`, from `offset` of a file on, `step` bytes apart.

        Raises EOFError if the file ends before, OSError if it cannot be read.
        """


@cache
def load_turner() -> Turner:
    """Return the fastest turner that this installation has."""
    return CompiledTurner() if importlib.util.find_spec("llvmlite") is not None else NumpyTurner()


class NumpyTurner:
    """Turns by numpy's copies."""

    def turn(self, columns: TileArray, out: TileArray) -> None:
        """Write columns to rows, by way of a block that stays in the cache."""
        block = np.empty((_AT_ONCE, _ROWS + _PADDING), out.dtype)
        for column in range(0, len(columns), _AT_ONCE):
            for row in range(0, len(out), _ROWS):
                part = columns[column : column + _AT_ONCE, row : row + _ROWS]
                width, height = part.shape
                block[:width, :height] = part
                out[row : row + height, column : column + width] = block[:width, :height].T

    def read(self, fd: int, columns: ByteArray, offset: int, step: int) -> None:
        """Read one column after the other."""
        read_strided(fd, columns.data, offset, step)


def _emit(module: ir.Module, name: str) -> None:
    from .turn_code import emit

    emit(module, name)


class CompiledTurner(NumpyTurner):
    """Turns in the processor's registers; what is too small for that, numpy does."""

    def __init__(self) -> None:
        from .compiling import CpuFunctions
        from .turn_code import BLOCK_BYTES, LINE_BYTES

        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._turns = CpuFunctions(_emit, [pointer, size, pointer, size, size, size])
        self._reads = CpuFunctions(_emit, [pointer, size, size, pointer, ctypes.c_int, size, size])
        self._least = (LINE_BYTES, BLOCK_BYTES)

    def turn(self, columns: TileArray, out: TileArray) -> None:
        """Write columns to rows, block by block."""
        count, rows = columns.shape
        width = out.itemsize
        if count * width < self._least[0] or rows * width < self._least[1]:
            super().turn(columns, out)
            return
        places = [(each.__array_interface__["data"][0], each.strides[0] // width) for each in (columns, out)]
        self._turns[f"turn_{8 * width}"](*places[0], *places[1], count, rows)

    def read(self, fd: int, columns: ByteArray, offset: int, step: int) -> None:
        """Read one column after the other; what the first that fails lacks is found out by reading it again."""
        count, size = columns.shape
        done = np.zeros(1, np.int64)
        place, result = (each.__array_interface__["data"][0] for each in (columns, done))
        self._reads["read_columns"](place, size, count, result, fd, offset, step)
        left = int(done[0])
        if left < count:
            read_strided(fd, columns[left:].data, offset + left * step, step)
