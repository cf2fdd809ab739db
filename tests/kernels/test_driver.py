"""The CUDA layer without a GPU: a driver in Python, called through ctypes as the real one is, shows what the host side does."""

from __future__ import annotations

import ctypes
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from mfptq.errors import MemoryBudgetError, UsageError
from mfptq.kernels import ErrorStats, Kernel, QuantizeArgs, cuda, driver, load_kernel
from mfptq.kernels.driver import SIGNATURES, Device, DeviceMemoryError, DeviceStream, Driver, DriverError

NAMES = {2: b"CUDA_ERROR_OUT_OF_MEMORY", 222: b"CUDA_ERROR_UNSUPPORTED_PTX_VERSION", 700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}
TYPES = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}


class FakeLibrary:
    """A driver of one device whose memory is the host's; work is done when it is asked for, by the CPU's kernel."""

    def __init__(self, **codes: int) -> None:
        self.codes = codes  # what calls return instead of 0
        self.most = 2**40  # bytes that one allocation on the device may have
        self.live: dict[int, object] = {}
        self.sizes: list[int] = []
        self.contexts = threading.local()
        self.kernels: list[str] = []
        self.lock = threading.Lock()
        for name, types in SIGNATURES.items():
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *types)(partial(self._call, name)))

    def _call(self, name: str, *arguments) -> int:
        if name.startswith(("cuMem", "cuStream", "cuEvent", "cuModule", "cuLaunch")) and not self.depth:
            return 201  # no context
        return self.codes.get(name) or getattr(self, f"do_{name.removesuffix('_v2')}", lambda *_: 0)(*arguments) or 0

    @property
    def depth(self) -> int:
        return getattr(self.contexts, "depth", 0)

    def do_cuCtxPushCurrent(self, context: int) -> None:
        self.contexts.depth = self.depth + 1

    def do_cuCtxPopCurrent(self, context) -> None:
        self.contexts.depth = self.depth - 1

    def do_cuGetErrorName(self, code: int, text) -> None:
        text[0] = NAMES.get(code)

    def do_cuDeviceGetCount(self, count) -> None:
        count[0] = 1

    def do_cuDeviceGetName(self, name: int, size: int, device: int) -> None:
        ctypes.memmove(name, b"Fake GPU\0", 9)

    def do_cuDeviceGetAttribute(self, value, which: int, device: int) -> None:
        value[0] = {75: 9, 76: 1}[which]

    def do_cuMemAlloc(self, pointer, size: int) -> int:
        if size > self.most:
            return 2
        self.sizes.append(size)
        return self.do_cuMemHostAlloc(pointer, size, 0)

    def do_cuMemHostAlloc(self, pointer, size: int, flags: int) -> int:
        memory = ctypes.create_string_buffer(b"\xee" * size, size)
        with self.lock:
            self.live[ctypes.addressof(memory)] = memory
        pointer[0] = ctypes.addressof(memory)
        return 0

    def do_cuMemFree(self, pointer: int) -> None:
        del self.live[pointer]

    do_cuMemFreeHost = do_cuMemFree

    def do_cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)

    do_cuMemcpyDtoHAsync = do_cuMemcpyHtoDAsync

    def do_cuMemsetD8Async(self, target: int, value: int, size: int, stream: int) -> None:
        ctypes.memset(target, value, size)

    def do_cuModuleLoadDataEx(self, module, image: bytes, count: int, options, values) -> int:
        if image != b"broken":
            return 0
        ctypes.memmove(values[list(options[:count]).index(5)], b"ptxas fatal:\n  line 1\0", 23)
        return 222

    def do_cuModuleGetFunction(self, function, module: int, name: bytes) -> None:
        self.kernels.append(name.decode())
        function[0] = len(self.kernels)

    def do_cuLaunchKernel(self, function: int, grid: int, y: int, z: int, threads: int, *rest) -> None:
        method, kind = self.kernels[function - 1].split("_")
        address = [ctypes.c_uint64.from_address(place).value for place in rest[4][: 3 if method == "amax" else 5]]
        if method == "amax":
            words = memory(address[0], address[1] * 32 // int(kind), f"u{int(kind) // 8}")
            result = memory(address[2], 1, np.uint32)
            result[0] = max(result[0], int((words & (2 ** (int(kind) - 1) - 1)).max()))
            return
        source, packed, scales, stats, blocks = address
        recipe = QuantizeArgs(method, ctypes.c_float.from_address(rest[4][5]).value)
        out = memory(packed, blocks * 8, np.uint8), memory(scales, blocks, np.uint8)
        found = load_kernel("cpu").quantize(memory(source, blocks * 16, TYPES[kind]).reshape(1, -1), recipe, *out)
        columns = memory(stats, 7 * grid * threads // 32, np.float64).reshape(7, -1)
        columns[:] = 0
        columns[:, -1] = (*sums(found)[:3], found.worst_block**2, *counts(found)[1:])


def memory(address: int, size: int, dtype) -> np.ndarray:
    """Return an array of what lies at an address."""
    return np.frombuffer((ctypes.c_ubyte * (size * np.dtype(dtype).itemsize)).from_address(address), dtype)


def sums(stats: ErrorStats) -> tuple[float, ...]:
    return stats.squared_error, stats.squared_weight, stats.rounding_squared_error, stats.worst_block


def counts(stats: ErrorStats) -> tuple[int, ...]:
    return stats.weights, stats.zeroed, stats.saturated_blocks, stats.zero_blocks


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """A fake driver that `CudaKernel` finds as its own."""
    found = FakeLibrary()
    device = Device(Driver(found), 0)
    monkeypatch.setattr(cuda, "open_device", lambda ordinal: device)
    monkeypatch.setattr(cuda, "_ptx", lambda: b"text for all")
    return found


def test_errors_have_the_drivers_names() -> None:
    with pytest.raises(DriverError, match="cuInit: CUDA_ERROR_ILLEGAL_ADDRESS"):
        Driver(FakeLibrary(cuInit=700))
    with pytest.raises(DriverError, match="cuInit: error 9999"):
        Driver(FakeLibrary(cuInit=9999))
    device = Device(Driver(FakeLibrary(cuMemAlloc_v2=2)), 0)
    assert (device.name, device.capability) == ("Fake GPU", (9, 1))
    with device, pytest.raises(DeviceMemoryError, match="cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY"):
        driver.DeviceMemory(device, 10)
    with device, pytest.raises(DriverError, match=r"UNSUPPORTED_PTX_VERSION .*: ptxas fatal: line 1$"):
        device.load(b"broken", ["search_f32"])


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver, "load_driver", driver.load_driver.__wrapped__)  # what a GPU's tests opened stays theirs
    monkeypatch.setattr(cuda, "open_device", driver.open_device.__wrapped__)
    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    assert driver.device_count() == 0
    with pytest.raises(UsageError, match=r"no CUDA driver: .*cannot open"):
        cuda.CudaKernel("cuda")


def test_memory_goes_with_its_last_view() -> None:
    library = FakeLibrary()
    device = Device(Driver(library), 0)
    with device:
        array, stream, held = device.pinned(100), DeviceStream(device), driver.DeviceMemory(device, 10)
    assert array.shape == (100,)
    assert len(library.live) == 2
    view = array[90:].view(np.uint16)
    del array
    gc.collect()
    assert len(library.live) == 2
    view[:] = 1
    del view, stream, held
    gc.collect()
    assert not library.live
    assert library.depth == 0


def tile(kind: str, rows: int, columns: int) -> np.ndarray:
    values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if kind == "bf16" else values.astype(TYPES[kind])


def results(kernel: Kernel, weight: np.ndarray, method: str = "search") -> tuple:
    rows, columns = weight.shape
    packed, codes = np.empty((rows, columns // 2), np.uint8), np.empty((rows, columns // 16), np.uint8)
    stats = kernel.quantize(weight, QuantizeArgs(method, 512.0), packed, codes)
    return kernel.amax(weight), packed.tobytes(), codes.tobytes(), counts(stats), sums(stats)


def expected(weight: np.ndarray, method: str = "search") -> tuple:
    *exact, found = results(load_kernel("cpu"), weight, method)
    return (*exact, pytest.approx(found))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("method", ["search", "minmax"])
def test_tiles_and_what_they_become_are_copied_whole(library: FakeLibrary, kind: str, method: str) -> None:
    kernel = cuda.CudaKernel("cuda:0")
    assert kernel.name == "cuda:0"
    for shape in ((3, 48), (1, 16), (65, 1040)):
        weight = tile(kind, *shape)
        assert results(kernel, weight, method) == expected(weight, method)
    assert library.depth == 0


def test_every_thread_has_its_own_buffers(library: FakeLibrary) -> None:
    kernel, weights = cuda.CudaKernel("cuda"), [tile("f32", rows, 160) for rows in range(1, 40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(partial(results, kernel), weights))
    assert found == [expected(weight) for weight in weights]
    del kernel, pool
    gc.collect()
    assert not library.live


def test_less_memory_than_a_tile_needs(library: FakeLibrary) -> None:
    kernel, weight = cuda.CudaKernel("cuda"), tile("bf16", 9, 160_000)
    library.most = 2_600_000  # the tile has 2.88 MB, and becomes 0.81 MB
    assert results(kernel, weight) == expected(weight)
    assert max(library.sizes) < library.most
    library.most = 1_000_000
    for call in (kernel.amax, partial(results, kernel)):
        with pytest.raises(MemoryBudgetError, match=r"^cuda:0 \(Fake GPU\) has no memory .* 2.9 MB, .*--max-workers"):
            call(weight)
    assert results(kernel, weight[:1]) == expected(weight[:1])
    library.codes["cuMemHostAlloc"] = 2
    with pytest.raises(MemoryBudgetError, match="pinned"):
        kernel.allocate(4096)


def test_devices_that_cannot_be_used(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda:", "cuda:x", "cuda:-1", "cuda0", "cuda:99999"):
        with pytest.raises(UsageError, match="expected cuda or cuda:N"):
            cuda.CudaKernel(name)
    with pytest.raises(UsageError, match="no CUDA device 99: the driver shows 1"):
        Device(Driver(library), 99)
    monkeypatch.setattr(cuda, "_ptx", lambda: b"broken")
    with pytest.raises(UsageError, match=r"'cuda' cannot be used: .*UNSUPPORTED_PTX_VERSION"):
        cuda.CudaKernel("cuda")
