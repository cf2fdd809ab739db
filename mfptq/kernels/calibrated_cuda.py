"""The kernel of the calibrated methods for NVIDIA GPUs: an input's statistics are sent to the device once, for all its tiles."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import numpy as np

from ..dtypes import dtype_name
from ..kernels import QuantizeArgs, TileArray
from ..nvfp4 import ByteArray
from .calibrated import FEEDBACK, FUNCTIONS, PreparedStatistics
from .cuda import CudaWorker
from .driver import DeviceMemory
from .stats import ErrorStats


class CalibratedCudaKernel(CudaWorker):
    """Quantizes on a GPU by statistics; safe to use from several threads.

    `_lock` guards `_copies`: what lies on the device of each input's statistics, for as long as the host holds them.
    """

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._lock = threading.Lock()
        self._copies: WeakKeyDictionary[PreparedStatistics, DeviceMemory] = WeakKeyDictionary()

    def quantize(
        self,
        tile: TileArray,
        args: QuantizeArgs,
        statistics: PreparedStatistics,
        *,
        packed: ByteArray,
        scales: ByteArray,
    ) -> ErrorStats:
        """Write uint8 `[R, K/2]` packed values and `[R, K/16]` scale codes; the tile must be finite.

        Raises MemoryBudgetError where the device has no memory for the statistics, or even for half of the tile.
        """
        whole = statistics.origin or statistics
        known = self._copy(whole).pointer + statistics.start * (whole.values.nbytes // len(whole.values))
        rank = statistics.rank if args.method == FEEDBACK else None
        name = f"{FUNCTIONS[args.method]}_{dtype_name(tile)}"
        return self._quantize(tile, args, (packed, scales), name, known=known, rank=rank)

    def _copy(self, statistics: PreparedStatistics) -> DeviceMemory:
        """Return the statistics on the device: sent by the first thread that needs them, while the others wait."""
        with self._lock:
            found = self._copies.get(statistics)
            if found is None:
                values = np.ascontiguousarray(statistics.values)
                with self._working("the statistics of an input"):
                    found = DeviceMemory(self._device, values.nbytes)
                    self._lane.stream.upload(found.pointer, values)
                    self._lane.stream.wait()
                self._copies[statistics] = found
            return found
