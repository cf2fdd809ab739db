"""Decode codes on an NVIDIA GPU, by the arithmetic of the CPU's decoder and to the same bytes.

Called by workers whose kernel is a GPU's. Codes and scales are sent, values come back to where a plain tile would lie: they are
also checked and summed on the host.
"""

from __future__ import annotations

from ctypes import c_int64, c_uint64

import numpy as np
import numpy.typing as npt

from ..checkpoint.encoding import Bf16Array, DecodedArray, ScaleArray
from .cuda import THREADS, CudaWorker
from .decode import load_decoder
from .driver import DeviceMemoryError


class CudaDecoder(CudaWorker):
    """Decodes on a GPU; safe to use from several threads. What it cannot do, or has no memory for, the CPU does."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._cpu = load_decoder()

    def __call__(
        self, codes: str, packed: npt.NDArray[np.uint8], scales: ScaleArray, out: DecodedArray, *, run: int
    ) -> None:
        """Write raw bfloat16 bits to `out` `[R, K]`; see `CodeScaler`. All arrays are C-contiguous."""
        if out.dtype != np.uint16:
            self._cpu(codes, packed, scales, out, run=run)
            return
        with self._working("codes"):
            try:
                places = self._lane.room.places(packed.nbytes, scales.nbytes, out.nbytes)
            except DeviceMemoryError:
                self._cpu(codes, packed, scales, out, run=run)
                return
            stream = self._lane.stream
            stream.upload(places[0], packed)
            stream.upload(places[1], scales)
            sizes = (out.size, out.shape[1], run)
            self._launch(f"decode_{codes}", out.size, THREADS, (*map(c_uint64, places), *map(c_int64, sizes)))
            stream.download(out, places[2])
            stream.wait()

    def shift(self, values: Bf16Array, shifts: Bf16Array) -> bool:
        """Multiply by powers of two, on the CPU; see `CodeScaler`."""
        return self._cpu.shift(values, shifts)
