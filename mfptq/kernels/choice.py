"""Which device a run is best on: a GPU pays where the cores would take longer than it takes to start."""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass

CORE_WEIGHTS = 2.5e8  # a second, by one core, `search`, with reading and writing
GPU_WEIGHTS = 1.5e9  # a second, whatever the GPU: by then the copies and the disk decide
GPU_START = 6.0  # seconds, of importing torch and Triton and of loading kernels


@dataclass(frozen=True, slots=True)
class Choice:
    """A device, and why it was chosen."""

    device: str
    reason: str


def choose_device(device: str, weights: int, cores: int) -> Choice:
    """Return the device for so many weights: `device` itself, or for "auto" what should finish first.

    Nothing of CUDA is imported to find out: the driver is asked how many devices there are.
    """
    if device != "auto":
        return Choice(device, "as asked")
    on_cores, on_gpu = weights / (CORE_WEIGHTS * cores), GPU_START + weights / GPU_WEIGHTS
    if not (cuda_devices() and importlib.util.find_spec("triton")):
        return Choice("cpu", "there is no CUDA device with Triton")
    estimate = f"about {on_cores:.0f} s on {cores} cores, {on_gpu:.0f} s on a GPU with its start"
    return Choice("cuda", estimate) if on_gpu < on_cores else Choice("cpu", estimate)


def cuda_devices() -> int:
    """Return how many devices the CUDA driver shows; 0 where there is no driver."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0
