"""Call the CUDA driver through ctypes: what the kernels need of it, so that nothing but NVIDIA's driver must be installed.

Called by `cuda.py`, `cuda_statistics.py`, `decode_cuda.py` and `choice.py`. Calls release the interpreter's lock; those that
work on a device must be made inside `with device:`.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_void_p
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MfptqError, UsageError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
OUT_OF_MEMORY = 2  # an error code
CAPABILITY = (75, 76)  # attributes of a device: major, minor
NON_BLOCKING, SLEEPING = 1, 1 | 2  # a stream that waits for no other; an event whose waiters sleep, without time stamps
JIT_LOG = (5, 6)  # options: where errors are written, and how many bytes of them
_INT, _SIZE, _TEXT, _HANDLE = POINTER(c_int), POINTER(c_size_t), POINTER(c_char_p), POINTER(c_void_p)
SIGNATURES: dict[str, tuple[Any, ...]] = {  # addresses on a device have 64 bits, as those of the host
    "cuInit": (c_uint,),
    **dict.fromkeys(("cuGetErrorName", "cuGetErrorString"), (c_int, _TEXT)),
    "cuDeviceGetCount": (_INT,),
    "cuDeviceGet": (_INT, c_int),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceGetAttribute": (_INT, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    **dict.fromkeys(("cuCtxPushCurrent_v2", "cuEventSynchronize"), (c_void_p,)),
    "cuCtxPopCurrent_v2": (_HANDLE,),
    "cuMemGetInfo_v2": (_SIZE, _SIZE),
    "cuMemAlloc_v2": (_HANDLE, c_size_t),
    "cuMemHostAlloc": (_HANDLE, c_size_t, c_uint),
    **dict.fromkeys(("cuStreamCreate", "cuEventCreate"), (_HANDLE, c_uint)),
    **dict.fromkeys(("cuMemFree_v2", "cuMemFreeHost", "cuStreamDestroy_v2", "cuEventDestroy_v2"), (c_void_p,)),
    **dict.fromkeys(("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"), (c_void_p, c_void_p, c_size_t, c_void_p)),
    "cuMemsetD8Async": (c_void_p, c_ubyte, c_size_t, c_void_p),
    "cuModuleLoadDataEx": (_HANDLE, c_char_p, c_uint, _INT, _HANDLE),
    "cuModuleGetFunction": (_HANDLE, c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, _HANDLE, _HANDLE),
    "cuEventRecord": (c_void_p, c_void_p),
}

ALIGNMENT = 256  # of what lies in a buffer of a device, in bytes


class DriverError(MfptqError):
    """The CUDA driver refused a call; the message has its name for the error."""


class DeviceMemoryError(DriverError):
    """The device, or the host where memory is to be pinned, has no more to give."""


class Driver:
    """The driver's functions, initialized."""

    def __init__(self, library: Any) -> None:
        self.functions = {name: getattr(library, name) for name in SIGNATURES}
        for name, function in self.functions.items():
            function.argtypes, function.restype = SIGNATURES[name], c_int
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; raises DriverError, DeviceMemoryError where memory is out, for any code but success."""
        code = self.functions[name](*arguments)
        if code:
            texts = [self._text(of, code) for of in ("cuGetErrorName", "cuGetErrorString")]
            raise (DeviceMemoryError if code == OUT_OF_MEMORY else DriverError)(f"{name}: {texts[0]} ({texts[1]})")

    def get(self, ctype: Any, name: str, *arguments: Any) -> Any:
        """Return what a function puts where its first argument points, of a ctypes type; 0 for a null pointer."""
        found = ctype()
        self.call(name, byref(found), *arguments)
        return found.value or 0

    def _text(self, name: str, code: int) -> str:
        found = c_char_p()
        self.functions[name](code, byref(found))  # leaves null for codes that it does not know
        return found.value.decode() if found.value else f"error {code}"


@cache
def load_driver() -> Driver:
    """Return the installed driver; raises UsageError where there is none, DriverError where it does not work."""
    try:
        return Driver(ctypes.CDLL(LIBRARY))
    except OSError as error:
        raise UsageError(f"there is no CUDA driver: {error}") from None


def device_count() -> int:
    """Return how many devices the driver shows, without a context on any; 0 where there is no driver that works."""
    with suppress(UsageError, DriverError):
        return int(load_driver().get(c_int, "cuDeviceGetCount"))
    return 0


@cache
def open_device(ordinal: int) -> Device:
    """Return a device by its number, the same object each time: its context lives as long as the process."""
    return Device(load_driver(), ordinal)


class Device:
    """A GPU: in `with device:`, the thread's context is its primary one, which it shares with other CUDA libraries."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        if ordinal >= (count := driver.get(c_int, "cuDeviceGetCount")):
            raise UsageError(f"there is no CUDA device {ordinal}: the driver shows {count}, counted from 0")
        number = driver.get(c_int, "cuDeviceGet", ordinal)
        self.driver = driver
        self.name = driver.get(c_char * 256, "cuDeviceGetName", 256, number).decode(errors="replace")
        major, minor = (driver.get(c_int, "cuDeviceGetAttribute", which, number) for which in CAPABILITY)
        self.capability: tuple[int, int] = major, minor
        self._context = driver.get(c_void_p, "cuDevicePrimaryCtxRetain", number)

    def __enter__(self) -> None:
        self.driver.call("cuCtxPushCurrent_v2", self._context)

    def __exit__(self, *_error: object) -> None:
        self.driver.get(c_void_p, "cuCtxPopCurrent_v2")

    def free_memory(self) -> int:
        """Return how many bytes the device has left for everyone."""
        return int(self.driver.get(c_size_t, "cuMemGetInfo_v2", byref(c_size_t())))

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        """Return `size` bytes of host memory that is copied beside running kernels; freed with the last view of it."""
        address = self.driver.get(c_void_p, "cuMemHostAlloc", size, 0)
        owner = (c_ubyte * size).from_address(address)
        self.owned(owner, "cuMemFreeHost", address)
        return np.frombuffer(memoryview(owner), np.uint8)

    def load(self, image: bytes, name: str) -> int:
        """Return a kernel of a text in PTX; the driver compiles it, and keeps the result on disk."""
        log = ctypes.create_string_buffer(4096)
        values = (c_void_p * 2)(ctypes.addressof(log), len(log))
        try:
            module = self.driver.get(c_void_p, "cuModuleLoadDataEx", image, 2, (c_int * 2)(*JIT_LOG), values)
        except DriverError as error:
            raise type(error)(" ".join([f"{error}:", *log.value.decode(errors="replace").split()])) from None
        return int(self.driver.get(c_void_p, "cuModuleGetFunction", module, name.encode()))

    def owned(self, owner: object, destroy: str, handle: int) -> Any:
        """Destroy a handle when its owner goes or the result is called; a process that ends takes all with it."""
        final = weakref.finalize(owner, self._destroy, destroy, handle)
        final.atexit = False
        return final

    def _destroy(self, destroy: str, handle: int) -> None:
        """Give a handle back without asking how it went: after a failed kernel, already reported, every call fails."""
        with suppress(DriverError), self:
            self.driver.call(destroy, handle)


class DeviceMemory:
    """Memory of a device: `pointer` is its address there; `free` gives it back before the object goes."""

    def __init__(self, device: Device, size: int) -> None:
        self.pointer = device.driver.get(c_void_p, "cuMemAlloc_v2", size)
        self.free = device.owned(self, "cuMemFree_v2", self.pointer)


class DeviceRoom:
    """Memory on the device that one worker thread uses again and again; it grows to the most that was asked for."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: DeviceMemory | None = None
        self._size = 0

    def places(self, *sizes: int) -> list[int]:
        """Return addresses with room for so many bytes each; raises DeviceMemoryError."""
        ends = list(itertools.accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
        if ends[-1] > self._size:
            if self._memory is not None:
                self._memory.free()
            self._size, self._memory = 0, None
            self._memory = DeviceMemory(self._device, ends[-1])
            self._size = ends[-1]
        assert self._memory is not None
        return [self._memory.pointer + start for start in (0, *ends[:-1])]


class DeviceStream:
    """A queue of copies and kernels, done in order: every method puts something in, `wait` waits for all of it."""

    def __init__(self, device: Device) -> None:
        self._call = device.driver.call
        self._handle = device.driver.get(c_void_p, "cuStreamCreate", NON_BLOCKING)
        device.owned(self, "cuStreamDestroy_v2", self._handle)
        self._event = device.driver.get(c_void_p, "cuEventCreate", SLEEPING)
        device.owned(self, "cuEventDestroy_v2", self._event)

    def upload(self, pointer: int, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the device."""
        self._call("cuMemcpyHtoDAsync_v2", pointer, array.ctypes.data, array.nbytes, self._handle)

    def download(self, array: npt.NDArray[Any], pointer: int) -> None:
        """Fill a contiguous array from the device; whole after `wait`."""
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, pointer, array.nbytes, self._handle)

    def zero(self, pointer: int, size: int) -> None:
        """Set bytes of the device's memory to 0."""
        self._call("cuMemsetD8Async", pointer, 0, size, self._handle)

    def launch(self, function: int, grid: int, block: int, arguments: Sequence[Any]) -> None:
        """Run a kernel as `grid` blocks of `block` threads; the arguments are ctypes values."""
        addresses = (c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self._call("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, 0, self._handle, addresses, None)

    def wait(self) -> None:
        """Wait for all of the queue, asleep: reading, writing and hashing need the cores."""
        self._call("cuEventRecord", self._event, self._handle)
        self._call("cuEventSynchronize", self._event)
