"""Choose CPU or GPU for `--device auto` by estimated run time, GPU start-up included.

Called once for a run, by `execution.prepare`. Nothing is started on a device to find out: the driver is asked how many there
are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import has_compiler
from .calibrated import FEEDBACK
from .driver import device_count

# Measured on an H100 and up to 16 virtual cores of its host, 1.3 billion weights, files in the page cache. What both devices
# take alike is left out. Another processor may be twice as fast: so much may the choice be wrong by.
CORE_SECONDS = {
    "cast": 0.3e-9,
    "search": 2.1e-9,
    "minmax": 0.8e-9,
    "weighted": 3.9e-9,
    "hessian": 9.5e-9,
    "hessian+": 15.7e-9,
}  # a weight
OTHER_SECONDS = 2.2e-9  # of a core, for a weight, on either device: reading, hashing, writing
GPU_SECONDS = 1 / 7e9  # a weight at the least, by any method: the copies to and from the device decide
AS_GIVEN = "as given"  # why a device was chosen that is no "auto"
GPU_START = 0.6  # seconds, of opening the device, loading kernels and pinning memory


@dataclass(frozen=True, slots=True)
class Choice:
    """A device, and why it was chosen."""

    device: str
    reason: str


def choose_device(device: str, weights: Mapping[str, int], cores: int) -> Choice:
    """Return the device for so many weights of each method: `device` itself, or for "auto" what should finish first."""
    if device != "auto":
        return Choice(device, AS_GIVEN)
    if FEEDBACK in weights:
        return Choice("cpu", f"method {FEEDBACK} was never timed on a GPU")
    if not cuda_devices():
        return Choice("cpu", "there is no CUDA device")
    if not has_compiler():
        return Choice("cpu", "CUDA needs llvmlite")
    total = sum(weights.values())
    on_cores = sum(count * (CORE_SECONDS[method] + OTHER_SECONDS) for method, count in weights.items()) / cores
    on_gpu = GPU_START + total * max(OTHER_SECONDS / cores, GPU_SECONDS)
    estimate = f"about {on_cores:.1f} s on {cores} cores, {on_gpu:.1f} s with a GPU and its start"
    return Choice("cuda", estimate) if on_gpu < on_cores else Choice("cpu", estimate)


def cuda_devices() -> int:
    """Return how many devices the CUDA driver shows; 0 where there is no driver that works."""
    return device_count()
