"""The GPU's bytes are the CPU's: run where a CUDA device is, skipped elsewhere."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

import mfptq
from mfptq.calibration.feedback import feedback_statistics
from mfptq.calibration.methods import importance, local_hessian
from mfptq.dtypes import dtype_name
from mfptq.encodings.codes import CODE_FORMATS
from mfptq.errors import MemoryBudgetError, UsageError
from mfptq.fp8 import Segments, minmax_scales, search_scales
from mfptq.kernels import Kernel, QuantizeArgs, load_kernel
from mfptq.kernels.calibrated import CALIBRATED_METHODS, FEEDBACK, PreparedStatistics
from mfptq.kernels.choice import cuda_devices
from mfptq.kernels.driver import Driver

from ..calibration.files import factors_of
from ..encodings.test_convert import DENSE, twins

pytestmark = pytest.mark.skipif(not cuda_devices(), reason="needs a CUDA device")


def weights(dtype: str, rows: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(rows * columns)
    values = rng.standard_normal((rows, columns)).astype(np.float32) * 0.05
    values[rng.random(values.shape) < 0.001] *= 30
    values[0, :16] = 0
    values[-1, -16:] = -0.0
    values[rows // 2, :16] *= 1e-30 if dtype != "float16" else 1e-6
    if dtype == "uint16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


@pytest.mark.parametrize("method", ["search", "minmax"])
@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (7, 272), (64, 4096), (129, 1040)])
@pytest.mark.parametrize("global_scale", [2.0**10, 1234.5, 2.0**-3, 3e5])
def test_bytes_and_statistics_are_those_of_the_cpu(method, dtype, shape, global_scale) -> None:
    weight = weights(dtype, *shape)
    results = []
    for kernel in (load_kernel("cpu"), load_kernel("cuda")):
        packed = np.full((shape[0], shape[1] // 2), 0xEE, np.uint8)
        codes = np.full((shape[0], shape[1] // 16), 0xEE, np.uint8)
        results.append((packed, codes, kernel.quantize(weight, QuantizeArgs(method, global_scale), packed, codes)))
    (packed, codes, stats), (gpu_packed, gpu_codes, gpu_stats) = results
    assert np.array_equal(codes, gpu_codes)
    assert np.array_equal(packed, gpu_packed)
    for name in ("weights", "zeroed", "saturated_blocks", "zero_blocks"):
        assert getattr(stats, name) == getattr(gpu_stats, name), name
    for name in ("squared_error", "squared_weight", "rounding_squared_error", "worst_block"):
        assert getattr(gpu_stats, name) == pytest.approx(getattr(stats, name), rel=1e-5), name


def prepared(method: str, columns: int) -> PreparedStatistics:
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((300, columns)) * rng.lognormal(0, 1, columns)
    x[:, 1:] += 0.5 * x[:, :-1]
    blocks = x.reshape(300, -1, 16)
    hessian = (np.einsum("tbi,tbj->bij", blocks, blocks) / 300).astype(np.float32)
    if method == FEEDBACK:
        return PreparedStatistics(feedback_statistics(hessian, factors_of(x), 0.8))
    if method == "weighted":
        return PreparedStatistics(importance(np.diagonal(hessian, axis1=1, axis2=2).reshape(-1)))
    return PreparedStatistics(local_hessian(hessian, 10_000))


@pytest.mark.parametrize("method", CALIBRATED_METHODS)
@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (7, 272), (64, 4096), (129, 1040)])
@pytest.mark.parametrize("global_scale", [2.0**10, 1234.5, 2.0**-3, 3e5])
def test_calibrated_bytes_and_statistics_are_those_of_the_cpu(method, dtype, shape, global_scale) -> None:
    weight, more = weights(dtype, *shape), 0 if method == FEEDBACK else 16
    statistics = prepared(method, shape[1] + 2 * more).part(more, shape[1])
    results = []
    for kernel in (load_kernel("cpu"), load_kernel("cuda")):
        packed = np.full((shape[0], shape[1] // 2), 0xEE, np.uint8)
        codes = np.full((shape[0], shape[1] // 16), 0xEE, np.uint8)
        stats = kernel.quantize(weight, QuantizeArgs(method, global_scale, statistics), packed, codes)
        results.append((packed, codes, stats))
    (packed, codes, stats), (gpu_packed, gpu_codes, gpu_stats) = results
    assert np.array_equal(codes, gpu_codes)
    assert np.array_equal(packed, gpu_packed)
    for name in ("weights", "zeroed", "saturated_blocks", "zero_blocks"):
        assert getattr(stats, name) == getattr(gpu_stats, name), name
    for name in ("squared_error", "squared_weight", "rounding_squared_error", "worst_block"):
        assert getattr(gpu_stats, name) == pytest.approx(getattr(stats, name), rel=1e-5), name


@pytest.mark.parametrize("value", [0.0, 1.5, -3.0, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32"])
def test_amax_is_that_of_the_cpu(dtype, value) -> None:
    weight = weights("float32", 8, 64)
    weight[5, 7] = value
    stored = (weight.view(np.uint32) >> 16).astype(np.uint16) if dtype == "uint16" else weight.astype(dtype)
    found, expected = (load_kernel(device).amax(stored) for device in ("cuda", "cpu"))
    assert found == expected or (np.isnan(found) and np.isnan(expected))


def test_random_bits() -> None:
    for seed in range(20):
        bits = np.random.default_rng(seed).integers(0, 2**16, (64, 1024), np.uint16)
        bits[(bits & 0x7F80) == 0x7F80] = 0
        results = []
        for kernel in (load_kernel("cpu"), load_kernel("cuda")):
            packed, codes = np.empty((64, 512), np.uint8), np.empty((64, 64), np.uint8)
            for method, global_scale in (("search", 2.0 ** (seed - 10)), ("minmax", 1.7 * seed + 0.1)):
                kernel.quantize(bits, QuantizeArgs(method, global_scale), packed, codes)
                results.append(packed.tobytes() + codes.tobytes())
        assert results[:2] == results[2:]


def quantized(kernel: Kernel, weight: np.ndarray) -> tuple[bytes, bytes, float]:
    rows, columns = weight.shape
    packed, codes = kernel.allocate(rows * columns // 2), kernel.allocate(rows * columns // 16)
    amax = kernel.amax(weight)
    kernel.quantize(weight, QuantizeArgs("search", 512.0), packed.reshape(rows, -1), codes.reshape(rows, -1))
    return packed.tobytes(), codes.tobytes(), amax


def test_two_threads_at_once() -> None:
    kernel, barrier = load_kernel("cuda"), Barrier(2)
    tiles = [weights(dtype, rows, 1040) for rows in (300, 17, 801) for dtype in ("uint16", "float32")]

    def run(of: list[np.ndarray]) -> list[tuple[bytes, bytes, float]]:
        barrier.wait()
        return [quantized(kernel, tile) for tile in of * 5]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, (tiles, tiles[::-1])))
    expected = [quantized(load_kernel("cpu"), tile) for tile in tiles]
    assert found == [expected * 5, expected[::-1] * 5]


def test_half_a_tile_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    call, most, asked = Driver.call, 0, []

    def short(self: Driver, name: str, *arguments) -> None:
        if name == "cuMemAlloc_v2":
            asked.append(arguments[1])
            if arguments[1] > most:
                arguments = (arguments[0], 2**44)  # more than any device has: the driver itself refuses
        call(self, name, *arguments)

    kernel, weight = load_kernel("cuda"), weights("uint16", 1001, 4096)
    monkeypatch.setattr(Driver, "call", short)
    most = weight.nbytes
    assert quantized(kernel, weight) == quantized(load_kernel("cpu"), weight)
    assert max(asked) > most
    most = 10_000
    for run in (kernel.amax, lambda tile: quantized(kernel, tile)):
        with pytest.raises(MemoryBudgetError, match=r"^cuda:0 .* has no memory for a tile of 8.2 MB, .*max_workers"):
            run(weight)
    most = 2**40
    assert quantized(kernel, weight) == quantized(load_kernel("cpu"), weight)


def test_a_device_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match=r"no CUDA device 99: the driver shows \d"):
        load_kernel("cuda:99")


def test_nothing_but_the_driver_is_needed() -> None:
    code = (
        "import sys, numpy as np\n"
        "from mfptq.kernels import load_kernel\n"
        "assert load_kernel('cuda').amax(np.full((1, 16), -2, np.float32)) == 2\n"
        "assert not {'torch', 'triton'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32"])
@pytest.mark.parametrize(("rows", "columns"), [(257, 16), (300, 4096), (2000, 128), (3, 48)])
def test_fp8_is_that_of_the_cpu(dtype, exact, rows, columns) -> None:
    data = weights(dtype, rows, columns).reshape(-1)
    starts = np.arange(0, data.size + 1, columns, dtype=np.int64)
    amax = load_kernel("cpu").amax_each(data, starts)
    theirs = minmax_scales(amax, dtype_name(data))
    segments = Segments(starts, theirs if exact else search_scales(amax), theirs, exact)
    results = []
    for kernel in (load_kernel("cpu"), load_kernel("cuda")):
        codes = np.full(data.size, 0xEE, np.uint8)
        results.append((codes, *kernel.quantize_segments(data, segments, codes)))
    (codes, scales, stats), (gpu_codes, gpu_scales, gpu_stats) = results
    assert np.array_equal(codes, gpu_codes)
    assert np.array_equal(scales, gpu_scales)
    for name in ("weights", "zeroed", "saturated_blocks", "zero_blocks"):
        assert getattr(stats, name) == getattr(gpu_stats, name), name
    for name in ("squared_error", "squared_weight", "worst_block"):
        assert getattr(gpu_stats, name) == pytest.approx(getattr(stats, name), rel=1e-9), name
    place = data.copy()
    load_kernel("cuda").quantize_segments(place, segments, place.view(np.uint8)[: data.size])
    assert np.array_equal(place.view(np.uint8)[: data.size], codes), "codes may take the place of the values"


@pytest.mark.parametrize("codes", CODE_FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns", "run"), [(1, 16, 16), (5, 96, 32), (64, 4096, 128), (3, 48, 48), (2, 80, 32)]
)
def test_the_device_decodes_to_the_bytes_of_the_cpu(codes, rows, columns, run) -> None:
    rng, bits = np.random.default_rng(columns), CODE_FORMATS[codes].bits
    packed = rng.integers(0, 256, rows * columns * bits // 8).astype(np.uint8)
    scales = np.exp2(rng.integers(-140, 40, (rows, -(-columns // run)))).astype(np.float32) * np.float32(1.37)
    results = []
    for device in ("cpu", "cuda"):
        out = np.full((rows, columns), 0xEEEE, np.uint16)
        memory = out.view(np.uint8).reshape(-1)
        memory[out.nbytes - packed.nbytes :] = packed
        load_kernel(device).decoder(codes, memory[out.nbytes - packed.nbytes :], scales, out, run=run)
        results.append(out)
    assert np.array_equal(*results)


@pytest.mark.parametrize("name", ["blocks, F32", "rows", "MXFP8", "MXFP4", "INT4"])
def test_a_release_in_codes_and_a_mixture_convert_to_the_bytes_of_the_cpu(name, tmp_path) -> None:
    release, _ = twins(tmp_path, DENSE, name)
    formats = ["fp8-static=re:.*o_proj$", "fp8-dynamic=re:.*down_proj$", "fp8-block=re:.*out_proj$"]
    scales = {"input_scales": "auto", "method": "search", "formats": formats}
    for device in ("cpu", "cuda"):
        mfptq.convert(release, tmp_path / device, device=device, **scales)
    for file in sorted((tmp_path / "cpu").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "cuda" / file.name).read_bytes(), file.name
