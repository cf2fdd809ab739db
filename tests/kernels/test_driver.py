"""The CUDA layer without a GPU: a driver in Python, called through ctypes as the real one is, shows what the host side does."""

from __future__ import annotations

import ctypes
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from mfptq.calibration.feedback import feedback_statistics
from mfptq.encodings.codes import CODE_FORMATS, bf16_bits, scale_codes
from mfptq.errors import MemoryBudgetError, UsageError
from mfptq.fp8 import Segments, minmax_scales
from mfptq.kernels import ErrorStats, Kernel, QuantizeArgs, cuda, driver, load_kernel
from mfptq.kernels.calibrated import (
    FEEDBACK,
    FUNCTIONS,
    PreparedStatistics,
    feedback_size,
)
from mfptq.kernels.driver import SIGNATURES, Device, DeviceMemoryError, DeviceStream, Driver, DriverError
from mfptq.kernels.fp8 import quantize_fp8

NAMES = {2: b"CUDA_ERROR_OUT_OF_MEMORY", 222: b"CUDA_ERROR_UNSUPPORTED_PTX_VERSION", 700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}
TYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
METHODS = {function: method for method, function in FUNCTIONS.items()}


class FakeLibrary:
    """A driver of one device whose memory is the host's; work is done when it is asked for, by the CPU's kernel."""

    def __init__(self, **codes: int) -> None:
        self.codes = codes  # what calls return instead of 0
        self.most = 2**40  # bytes that one allocation on the device may have
        self.live: dict[int, object] = {}
        self.sizes: list[int] = []
        self.sent: list[int] = []  # sizes of copies to the device
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
        self.sent.append(size)

    def do_cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)

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
        name = self.kernels[function - 1]
        if name.startswith(("fp8_", "decode_")):
            of_codes(name, rest[4], 7 * grid * threads // 32)
            return
        method, dtype = name.split("_")
        count = {"amax": 3, "search": 5, "minmax": 5}.get(method, 8)
        address = [ctypes.c_uint64.from_address(place).value for place in rest[4][:count]]
        if method == "amax":
            words = memory(address[0], address[1] * 32 // int(dtype), f"u{int(dtype) // 8}")
            result = memory(address[2], 1, np.uint32)
            result[0] = max(result[0], int((words & (2 ** (int(dtype) - 1) - 1)).max()))
            return
        source, packed, scales, stats, *known, blocks = (
            address if count == 5 else (*address[:5], *address[6:], address[5])
        )
        args = QuantizeArgs(METHODS.get(method, method), ctypes.c_float.from_address(rest[4][count]).value)
        out = memory(packed, blocks * 8, np.uint8), memory(scales, blocks, np.uint8)
        values = memory(source, blocks * 16, TYPES[dtype]).reshape(1, -1)
        found = by_statistics(values, args, known, out) if known else load_kernel("cpu").quantize(values, args, *out)
        columns = memory(stats, 7 * grid * threads // 32, np.float64).reshape(7, -1)
        columns[:] = 0
        columns[:, -1] = (*sums(found)[:3], found.worst_block**2, *counts(found)[1:])


def of_codes(name: str, arguments, sums: int) -> None:
    """Do what the functions for FP8 and for decoding do, on the CPU."""
    address = [ctypes.c_uint64.from_address(place).value for place in arguments[: 7 if "fp8" in name else 6]]
    if name.startswith("decode_"):
        codes, (count, columns, run) = name.removeprefix("decode_"), address[3:]
        packed = memory(address[0], count * CODE_FORMATS[codes].bits // 8, np.uint8)
        rows = count // columns
        scales = memory(address[1], rows * -(-columns // run), np.float32).reshape(rows, -1)
        scale_codes(codes, packed, scales, memory(address[2], count, np.uint16).reshape(rows, columns), run=run)
        return
    count = address[6]
    starts = memory(address[3], count + 1, np.int64)
    first, second = (memory(place, count, np.float32) for place in address[4:6])
    values = memory(address[0], int(starts[-1]), TYPES[name.rpartition("_")[2]])
    codes = memory(address[1], len(values), np.uint8)
    first[:], found = quantize_fp8(values, Segments(starts, first, second, "exact" in name), codes)
    columns = memory(address[2], sums, np.float64).reshape(7, -1)
    columns[:] = 0
    columns[:, 0] = found.as_array() ** np.array([1, 1, 1, 2, 1, 1, 1])


def by_statistics(values: np.ndarray, args: QuantizeArgs, known: list[int], out: tuple) -> ErrorStats:
    """Quantize blocks of a matrix of `width` blocks a row, of which the first is block `first` of its row.

    Where rows are taken whole, the last number is the rank of their factors.
    """
    address, width, first = known
    rank, first = (first, 0) if args.method == FEEDBACK else (0, first)
    rows = -(-(first + values.size // 16) // width)
    shapes = {"weighted": (width * 16,), FEEDBACK: (width, feedback_size(rank))}
    shape = shapes.get(args.method, (width, 16, 16))
    statistics = PreparedStatistics(memory(address, int(np.prod(shape)), np.float32).reshape(shape).copy())
    whole = np.zeros((rows, width * 16), values.dtype)
    whole.reshape(-1)[first * 16 : first * 16 + values.size] = values
    packed, codes = np.zeros((rows, width * 8), np.uint8), np.zeros((rows, width), np.uint8)
    found = load_kernel("cpu").quantize(whole, replace(args, statistics=statistics), packed, codes)
    found.zero_blocks -= rows * width - values.size // 16
    out[0][:] = packed.reshape(-1)[first * 8 : first * 8 + out[0].size]
    out[1][:] = codes.reshape(-1)[first : first + out[1].size]
    return found


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
    monkeypatch.setattr(cuda, "_ptx", lambda name: b"text for all")
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
        device.load(b"broken", "search_F32")


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


def tile(dtype: str, rows: int, columns: int) -> np.ndarray:
    values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values.astype(TYPES[dtype])


def results(kernel: Kernel, weight: np.ndarray, method: str = "search") -> tuple:
    rows, columns = weight.shape
    packed, codes = np.empty((rows, columns // 2), np.uint8), np.empty((rows, columns // 16), np.uint8)
    stats = kernel.quantize(weight, QuantizeArgs(method, 512.0), packed, codes)
    return kernel.amax(weight), packed.tobytes(), codes.tobytes(), counts(stats), sums(stats)


def expected(weight: np.ndarray, method: str = "search") -> tuple:
    *exact, found = results(load_kernel("cpu"), weight, method)
    return (*exact, pytest.approx(found))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("method", ["search", "minmax"])
def test_tiles_and_what_they_become_are_copied_whole(library: FakeLibrary, dtype: str, method: str) -> None:
    kernel = cuda.CudaKernel("cuda:0")
    assert kernel.name == "cuda:0"
    for shape in ((3, 48), (1, 16), (65, 1040)):
        weight = tile(dtype, *shape)
        assert results(kernel, weight, method) == expected(weight, method)
    assert library.depth == 0


def test_every_thread_has_its_own_buffers(library: FakeLibrary) -> None:
    kernel, weights = cuda.CudaKernel("cuda"), [tile("F32", rows, 160) for rows in range(1, 40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(partial(results, kernel), weights))
    assert found == [expected(weight) for weight in weights]
    del kernel, pool
    gc.collect()
    assert not library.live


def test_less_memory_than_a_tile_needs(library: FakeLibrary) -> None:
    kernel, weight = cuda.CudaKernel("cuda"), tile("BF16", 9, 160_000)
    library.most = 2_600_000  # the tile has 2.88 MB, and becomes 0.81 MB
    assert results(kernel, weight) == expected(weight)
    assert max(library.sizes) < library.most
    library.most = 1_000_000
    for call in (kernel.amax, partial(results, kernel)):
        with pytest.raises(MemoryBudgetError, match=r"^cuda:0 \(Fake GPU\) has no memory .* 2.9 MB, .*max_workers"):
            call(weight)
    assert results(kernel, weight[:1]) == expected(weight[:1])
    library.codes["cuMemHostAlloc"] = 2
    with pytest.raises(MemoryBudgetError, match="pinned"):
        kernel.allocate(4096)


def test_devices_that_cannot_be_used(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda:", "cuda:x", "cuda:-1", "cuda0", "cuda:99999", "mps", "xpu", "cpu:0", "CUDA", ""):
        with pytest.raises(UsageError, match=r"is unknown, expected cpu, cuda, cuda:N or auto"):
            load_kernel(name)
    with monkeypatch.context() as patch:
        patch.setattr("mfptq.kernels.has_compiler", lambda: False)
        with pytest.raises(UsageError, match="device 'cuda' needs llvmlite: install it, or use cpu"):
            load_kernel("cuda")
    with pytest.raises(UsageError, match="no CUDA device 99: the driver shows 1"):
        Device(Driver(library), 99)
    monkeypatch.setattr(cuda, "_ptx", lambda name: b"broken")
    cuda.load_function.cache_clear()
    with pytest.raises(UsageError, match=r"'cuda' cannot be used: .*UNSUPPORTED_PTX_VERSION"):
        cuda.CudaKernel("cuda")


def prepared(method: str, columns: int) -> PreparedStatistics:
    rng = np.random.default_rng(columns)
    if method == "weighted":
        return PreparedStatistics(rng.lognormal(0, 1, columns).astype(np.float32))
    mixing = rng.standard_normal((columns // 16, 16, 16)).astype(np.float32)
    if method == FEEDBACK:
        factors = rng.standard_normal((5, columns)).astype(np.float32) / 10
        return PreparedStatistics(feedback_statistics(mixing @ mixing.transpose(0, 2, 1), factors, 0.9))
    return PreparedStatistics(mixing @ mixing.transpose(0, 2, 1))


def by_input(device: str, weight: np.ndarray, method: str, statistics: PreparedStatistics) -> tuple:
    kernel, (rows, columns) = load_kernel(device), weight.shape
    packed, codes = np.empty((rows, columns // 2), np.uint8), np.empty((rows, columns // 16), np.uint8)
    stats = kernel.quantize(weight, QuantizeArgs(method, 512.0, statistics), packed, codes)
    found = pytest.approx(sums(stats)) if device == "cpu" else sums(stats)
    return packed.tobytes(), codes.tobytes(), counts(stats), found


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("method", FUNCTIONS)
def test_tiles_go_with_the_statistics_of_their_columns(library: FakeLibrary, dtype: str, method: str) -> None:
    for rows, columns, start in ((3, 48, 0), (1, 16, 48), (65, 1040, 16), (1, 160, 32)):
        whole = prepared(method, columns if method == FEEDBACK else 1104)
        weight, statistics = tile(dtype, rows, columns), whole.part(0 if method == FEEDBACK else start, columns)
        assert by_input("cuda", weight, method, statistics) == by_input("cpu", weight, method, statistics)
    assert library.depth == 0


@pytest.mark.parametrize("method", ["weighted", "hessian"])
def test_less_memory_than_a_tile_with_statistics_needs(library: FakeLibrary, method: str) -> None:
    weight, statistics = tile("BF16", 9, 160_000), prepared(method, 160_000)
    library.most = 2_600_000 if method == "weighted" else 10_240_000  # one tile takes 3.7 MB, a Hessian 10.24 MB
    assert by_input("cuda", weight, method, statistics) == by_input("cpu", weight, method, statistics)
    library.most = 639_000
    with pytest.raises(MemoryBudgetError, match="no memory for the statistics of an input"):
        by_input("cuda", weight, method, prepared(method, 160_000))


def test_half_of_a_tile_is_of_whole_rows_where_they_are_taken_whole(library: FakeLibrary) -> None:
    weight, statistics = tile("BF16", 101, 4_000), prepared(FEEDBACK, 4_000)
    library.most = 600_000  # a tile takes 1.06 MB, 51 of its rows 0.54 MB, the records 0.42 MB
    assert by_input("cuda", weight, FEEDBACK, statistics) == by_input("cpu", weight, FEEDBACK, statistics)
    library.most = 500_000
    with pytest.raises(MemoryBudgetError, match="no memory for a tile"):
        by_input("cuda", weight, FEEDBACK, statistics)


def test_statistics_are_sent_once_and_go_with_their_input(library: FakeLibrary) -> None:
    kernels, statistics, weight = [load_kernel("cuda")], prepared("hessian", 256), tile("F32", 40, 256)
    packed, codes = np.empty((40, 128), np.uint8), np.empty((40, 16), np.uint8)

    def quantize(part: PreparedStatistics) -> None:
        kernels[0].quantize(weight, QuantizeArgs("hessian", 512.0, part), packed.copy(), codes.copy())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(quantize, [statistics.part(0, 256) for _ in range(20)]))
        list(pool.map(quantize, [statistics] * 20))
        assert library.sent.count(statistics.values.nbytes) == 1
        held = len(library.live)
        quantize(prepared("hessian", 256))
        assert library.sent.count(statistics.values.nbytes) == 2
        gc.collect()
        assert len(library.live) == held + 1  # this thread's buffer; its statistics went with their input
        del statistics
        gc.collect()
        assert len(library.live) == held
    del kernels[0], pool
    gc.collect()
    assert not library.live


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_values_become_fp8_in_their_own_memory(library: FakeLibrary, dtype: str, exact: bool) -> None:
    data = tile(dtype, 300, 64).reshape(-1)
    starts = np.arange(0, data.size + 1, 64, dtype=np.int64)
    theirs = minmax_scales(load_kernel("cpu").amax_each(data, starts), dtype)
    segments = Segments(starts, theirs if exact else theirs * np.float32(1.01), theirs, exact)
    expected = np.empty(data.size, np.uint8)
    scales, stats = quantize_fp8(data, segments, expected)
    kernel = cuda.CudaKernel("cuda")
    for most in (10**9, 1000):  # with too little memory the CPU does it
        library.most, place = most, data.copy()
        codes = place.view(np.uint8)[: data.size]
        found = kernel.quantize_segments(place, segments, codes)
        assert np.array_equal(codes, expected)
        assert np.array_equal(found[0], scales)
        assert (counts(found[1]), sums(found[1])) == (counts(stats), pytest.approx(sums(stats)))
        kernel = cuda.CudaKernel("cuda") if most > 1000 else kernel
    assert sum(name.startswith("fp8_") for name in library.kernels) == 1


@pytest.mark.parametrize("codes", CODE_FORMATS)
def test_codes_are_decoded_on_the_device(library: FakeLibrary, codes: str) -> None:
    rng, bits = np.random.default_rng(1), CODE_FORMATS[codes].bits
    packed = rng.integers(0, 256, 6 * 96 * bits // 8).astype(np.uint8)
    scales, expected = rng.random((6, 3), np.float32), np.empty((6, 96), np.uint16)
    scale_codes(codes, packed, scales, expected, run=32)
    decoder = cuda.CudaKernel("cuda").decoder
    for most in (10**9, 100):
        library.most, out = most, np.empty((6, 96), np.uint16)
        place = out.view(np.uint8).reshape(-1)[out.nbytes - packed.nbytes :]
        place[:] = packed
        decoder(codes, place, scales, out, run=32)
        assert np.array_equal(out, expected)
        decoder = cuda.CudaKernel("cuda").decoder if most > 100 else decoder
    assert library.kernels.count(f"decode_{codes}") == 1
    wide = np.empty((6, 96), np.float32)
    decoder(codes, packed, scales, wide, run=32)
    assert np.array_equal(bf16_bits(wide), expected)
