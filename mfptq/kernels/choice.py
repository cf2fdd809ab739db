"""Choose CPU or GPU for the device `auto` by estimated run time, including GPU start-up."""

from __future__ import annotations

from dataclasses import dataclass

from .driver import device_count

CORE_WEIGHTS = 2.5e8  # a second, by one core, `search`, with reading and writing
GPU_WEIGHTS = 1.5e9  # a second, whatever the GPU: by then the copies and the disk decide
GPU_START = 1.0  # seconds, of opening the device and of loading kernels


@dataclass(frozen=True, slots=True)
class Choice:
    """A device, and why it was chosen."""

    device: str
    reason: str


def choose_device(device: str, weights: int, cores: int) -> Choice:
    """Return the device for so many weights: `device` itself, or for "auto" what should finish first.

    Nothing is started on a device to find out: the driver is asked how many there are.
    """
    if device != "auto":
        return Choice(device, "as asked")
    on_cores, on_gpu = weights / (CORE_WEIGHTS * cores), GPU_START + weights / GPU_WEIGHTS
    if not cuda_devices():
        return Choice("cpu", "there is no CUDA device")
    estimate = f"about {on_cores:.0f} s on {cores} cores, {on_gpu:.0f} s on a GPU with its start"
    return Choice("cuda", estimate) if on_gpu < on_cores else Choice("cpu", estimate)


def cuda_devices() -> int:
    """Return how many devices the CUDA driver shows; 0 where there is no driver that works."""
    return device_count()
