"""Measure for a moment how fast these cores quantize, for an estimate of a run's time. Called by `preview`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from ..kernels import QuantizeArgs, load_kernel

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan

MEASURED_BYTES = 8 * 2**20
MEASURED_SECONDS = 0.5


def computing_seconds(plan: ConversionPlan, workers: int) -> float:
    """Return how long computing will take on these cores, from half a second of quantizing; reading is not counted."""
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
