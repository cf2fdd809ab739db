"""Estimate how long a plan's computing will take on this machine, by half a second of quantizing.

Called by `plan_text`. Reading and writing are not counted.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan

MEASURED_BYTES = 8 * 2**20
MEASURED_SECONDS = 0.5


def expected_seconds(plan: ConversionPlan, workers: int) -> float:
    """Return how long computing will take on these cores, from half a second of quantizing; reading is not counted."""
    import numpy as np

    from ..kernels import QuantizeArgs, load_kernel

    methods = plan.methods
    method = methods.most_common(1)[0][0] if methods else "minmax"
    measured = method if method in ("search", "minmax") else "search"
    kernel, rows = load_kernel("cpu"), MEASURED_BYTES // 2 // 4096
    tile = np.full((rows, 4096), 0x3C23, np.uint16)  # BF16 of one value: times do not depend on values
    packed, scales = np.empty((rows, 2048), np.uint8), np.empty((rows, 256), np.uint8)
    kernel.quantize(tile, QuantizeArgs(measured, 1.0), packed, scales)
    begun, done = time.monotonic(), 0
    while time.monotonic() - begun < MEASURED_SECONDS:
        kernel.quantize(tile, QuantizeArgs(measured, 1.0), packed, scales)
        done += tile.size
    speed = done / (time.monotonic() - begun)
    return sum(weight.size for weight in plan.weights()) / speed / max(1, workers)


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
