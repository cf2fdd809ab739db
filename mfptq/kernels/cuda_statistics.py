"""Keep inputs' statistics on an NVIDIA GPU: each is sent once, for all tiles of all weights that read the input.

Called by `cuda.py`, for the calibrated methods.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import numpy as np

from .calibrated import PreparedStatistics
from .driver import Device, DeviceMemory, DeviceStream


class DeviceStatistics:
    """The statistics on one device, each for as long as the host holds it.

    Threads: `place` from any. `_lock` guards `_copies`.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._copies: WeakKeyDictionary[PreparedStatistics, DeviceMemory] = WeakKeyDictionary()

    def place(self, statistics: PreparedStatistics, stream: DeviceStream) -> int:
        """Return where statistics lie, sent by the first thread that needs them while the others wait; raises DeviceMemoryError."""
        whole = statistics.origin or statistics
        begin: int = self._copy(whole, stream).pointer
        return begin + statistics.start * (whole.values.nbytes // len(whole.values))

    def _copy(self, statistics: PreparedStatistics, stream: DeviceStream) -> DeviceMemory:
        with self._lock:
            found = self._copies.get(statistics)
            if found is None:
                values = np.ascontiguousarray(statistics.values)
                found = DeviceMemory(self._device, values.nbytes)
                stream.upload(found.pointer, values)
                stream.wait()
                self._copies[statistics] = found
            return found
