"""Transpose matrices, and read columns from a file: compiled where LLVM is installed, else by numpy.

Called by `execution.transposed`, for matrices that are stored transposed.
"""

from __future__ import annotations

from ctypes import c_int
from functools import cache
from typing import Protocol

import numpy as np

from ..kernels import TileArray, has_compiler
from ..nvfp4 import ByteArray
from ..storage.files import read_strided

_AT_ONCE = 64  # columns of a block: what is written of a row fills whole cache lines
_ROWS = 512  # of a block, which then fits into the processor's nearest caches
_PADDING = 32  # values behind each column: powers of two apart, columns would push each other out of the cache


class Transposer(Protocol):
    """Transposes matrices; safe to use from several threads."""

    def transpose(self, columns: TileArray, out: TileArray) -> None:
        """Write `columns` `[C, R]` to `out` `[R, C]`; the values of a column, and of a row, follow each other."""

    def read(self, fd: int, columns: ByteArray, offset: int, step: int) -> None:
        """Fill each row of `columns`, bytes `[C, size]`, from `offset` of a file on, `step` bytes apart.

        Raises EOFError if the file ends before, OSError if it cannot be read.
        """


@cache
def load_transposer() -> Transposer:
    """Return the fastest transposer that this installation has."""
    return CompiledTransposer() if has_compiler() else NumpyTransposer()


class NumpyTransposer:
    """Transposes by numpy's copies."""

    def transpose(self, columns: TileArray, out: TileArray) -> None:
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


class CompiledTransposer(NumpyTransposer):
    """Transposes in the processor's registers; what is too small for that, numpy does."""

    def __init__(self) -> None:
        from .compiling import LONG, Array, CpuFunctions  # which needs llvmlite
        from .transpose_code import BLOCK_BYTES, LINE_BYTES, emit

        self._transposers = CpuFunctions(emit, [Array, LONG, Array, LONG, LONG, LONG])
        self._reads = CpuFunctions(emit, [Array, LONG, LONG, Array, c_int, LONG, LONG])
        self._least = (LINE_BYTES, BLOCK_BYTES)

    def transpose(self, columns: TileArray, out: TileArray) -> None:
        """Write columns to rows, block by block."""
        count, rows = columns.shape
        width = out.itemsize
        if count * width < self._least[0] or rows * width < self._least[1]:
            super().transpose(columns, out)
            return
        pitch, stride = (each.strides[0] // width for each in (columns, out))
        self._transposers[f"transpose_{8 * width}"](columns, pitch, out, stride, count, rows)

    def read(self, fd: int, columns: ByteArray, offset: int, step: int) -> None:
        """Read one column after the other; what the first that fails lacks is found out by reading it again."""
        count, size = columns.shape
        done = np.zeros(1, np.int64)
        self._reads["read_columns"](columns, size, count, done, fd, offset, step)
        left = int(done[0])
        if left < count:
            read_strided(fd, columns[left:].data, offset + left * step, step)
