"""Give compiled functions copies of their arrays that end where memory begins that nobody may touch.

`python -m pytest -p tests.kernels.guarded ...` runs any tests so: a function that reads or writes past the end of an array then
ends the process by SIGSEGV, where else it might find something there. Arrays that share memory, or have gaps, stay as they are.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mfptq.kernels.compiling import CpuFunctions

Bytes = npt.NDArray[np.uint8]
_protect = ctypes.CDLL(None, use_errno=True).mprotect
_protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_plain = CpuFunctions.__getitem__


def guarded(size: int) -> Bytes:
    """Return memory for so many bytes whose end is that of what may be touched."""
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, whole + mmap.PAGESIZE), np.uint8)
    if _protect(memory.ctypes.data + whole, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return memory[whole - size : whole]


def _on_guarded(function: Callable[..., None], *arguments: Any) -> None:
    arrays = [each for each in arguments if isinstance(each, np.ndarray)]

    def is_alone(array: npt.NDArray[Any]) -> bool:
        return array.flags.c_contiguous and sum(np.may_share_memory(array, other) for other in arrays) == 1

    copies = {
        i: (each, guarded(each.nbytes))
        for i, each in enumerate(arguments)
        if isinstance(each, np.ndarray) and each.size and is_alone(each)
    }
    for array, copy in copies.values():
        copy[:] = array.reshape(-1).view(np.uint8)
    function(*(copies[i][1] if i in copies else each for i, each in enumerate(arguments)))
    for array, copy in copies.values():
        if array.flags.writeable:
            array.reshape(-1).view(np.uint8)[:] = copy


def _getitem(functions: CpuFunctions, name: str) -> Callable[..., None]:
    function = _plain(functions, name)
    return lambda *arguments: _on_guarded(function, *arguments)


CpuFunctions.__getitem__ = _getitem  # type: ignore[method-assign]
