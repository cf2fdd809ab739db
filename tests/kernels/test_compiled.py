"""What LLVM makes of the kernels: nothing contracted, nothing recompiled, the same with other lanes and on old processors."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from llvmlite import binding, ir

import mfptq
from mfptq.calibration.feedback import feedback_statistics
from mfptq.kernels import QuantizeArgs, WeightBatch, compiling, load_kernel
from mfptq.kernels.calibrated import FEEDBACK, FUNCTIONS, LOCAL_METHODS, PreparedStatistics
from mfptq.kernels.calibrated_blocks import ColumnStatistics, calibrated, signed_values
from mfptq.kernels.compiling import CpuFunctions, _target, has_fused, optimized
from mfptq.kernels.cpu import CACHED_BYTES
from mfptq.kernels.cpu_code import emit
from mfptq.kernels.cuda import _ptx
from mfptq.kernels.feedback_blocks import Record, RowSums, with_feedback
from mfptq.kernels.ptx import compile_ptx
from mfptq.kernels.vector import BYTE, FLOAT, LONG, VOID, WORD, Code, Words
from tests.conftest import sampled

DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
METHODS = ("search", "minmax", *FUNCTIONS.values())


@pytest.fixture(scope="module", params=sampled(["BF16"], ["F16", "F32"]))
def texts(request: pytest.FixtureRequest) -> dict[str, str]:
    names = [f"{method}_{request.param}" for method in METHODS]
    return {name: compile_ptx(name).decode() for name in (*names, "amax_16", "amax_32")}


def test_ptx_has_one_kernel_and_rounds_as_ieee_754_says(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        assert re.findall(r"\.entry (\w+)\(", text) == [name]
        used = Counter(re.findall(r"^\s+(?:@%p\d+ )?(\w+)\.([\w.]*f(?:32|64))\b", text, re.MULTILINE))
        for (operation, how), _ in used.items():
            if operation in ("add", "sub", "mul", "div", "fma", "rcp", "sqrt"):
                assert how in ("rn.f32", "rn.f64"), f"{operation}.{how} may be contracted, approximated or flushed"
        assert ".ftz" not in text
        assert ".approx" not in text
        assert name.startswith("amax") or (".rn.f32" in text and ".entry" in text)


def test_fused_products_are_only_where_they_are_exact(texts: dict[str, str]) -> None:
    # search: ten candidates of sixteen values: two to round each, on either path, and one for its error on the simple one;
    # then one for each value's code. minmax: a value's code, and what it stands for. Calibrated: two to round a value, for a
    # candidate, for the chosen scale and for the one rounded to; and once more where descent moves a value.
    expected = {"search": 10 * 16 * (2 + 2 + 1) + 16, "minmax": 16 * (1 + 1), "amax": 0}
    expected |= {"weighted": 3 * 16 * 2, "hessian": 3 * 16 * 2, "descent": 4 * 16 * 2, FEEDBACK: 4 * 16 * 2}
    for name, text in texts.items():
        assert len(re.findall(r"\bfma\.rn\.f32", text)) == expected[name.split("_")[0]], name


def test_ptx_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]) -> None:
    monkeypatch.setenv("MFPTQ_CACHE_DIR", str(tmp_path))
    assert _ptx("amax_16").decode() == texts["amax_16"]
    monkeypatch.setattr("mfptq.kernels.ptx.compile_ptx", lambda _name: pytest.fail("compiled again"))
    assert _ptx("amax_16").decode() == texts["amax_16"]


@pytest.mark.parametrize(("package", "name"), [("llvmlite", "__version__"), ("llvmlite.binding", "llvm_version_info")])
def test_what_is_kept_is_of_one_version_of_llvmlite_and_of_llvm(
    package: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = compiling.ORIGIN
    monkeypatch.setattr(f"{package}.{name}", "another")
    assert compiling._origin() != before


def test_an_upgrade_during_a_run_mixes_no_code(tmp_path: Path) -> None:
    """A process that has begun keeps its functions under its own version's key, whatever lies in the package's folder by now."""
    package = tmp_path / "mfptq"
    shutil.copytree(Path(mfptq.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    upgrade = f"open({str(package / 'kernels' / 'blocks.py')!r}, 'a').write('# another version')"
    lines = [
        "import numpy",
        "from mfptq.kernels.cpu import CpuKernel",
        upgrade,
        "CpuKernel().amax(numpy.ones((1, 16), numpy.float16))",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "MFPTQ_CACHE_DIR": str(tmp_path / "kept")}
    for kept in (1, 2):
        subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, cwd=tmp_path, check=True)
        assert len(list((tmp_path / "kept").iterdir())) == kept
        lines = [line for line in lines if line != upgrade]


def test_processors_do_not_share_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiling._host()
    monkeypatch.setattr(binding, "get_host_cpu_name", lambda: "another")
    assert compiling._host.__wrapped__() != before


@pytest.mark.parametrize(
    "name",
    sampled(
        ["search_BF16", "minmax_F16", "gptq_F32"],
        ["descent_F32", "search_F32", "weighted_F16", "hessian_BF16", "gptq_BF16"],
    ),
)
def test_cpu_code_contracts_nothing(name: str) -> None:
    module = ir.Module(name)
    emit(module, name)
    written = str(optimized(module, _target()))
    operations = re.findall(r"= (f(?:add|sub|mul|div|neg)) ([a-z ]*?)<", written)
    assert operations
    assert {flags for _, flags in operations} == {""}, "fast-math flags"
    assert not re.search(r"llvm\.fmuladd|reassoc|contract", written)


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    code = (
        "import numpy as np\n"
        "import sys\n"
        "from mfptq.kernels import QuantizeArgs, load_kernel\n"
        "made = []\n"
        "from mfptq.kernels.compiling import CpuFunctions\n"
        "original = CpuFunctions._compile\n"
        "CpuFunctions._compile = lambda *a: (made.append(1), original(*a))[1]\n"
        "kernel = load_kernel()\n"
        "kernel.amax(np.zeros((1, 16), np.uint16))\n"
        "kernel.quantize(np.zeros((1, 16), np.uint16), QuantizeArgs('minmax', 1.0), np.empty((1, 8), np.uint8), np.empty((1, 1), np.uint8))\n"
        "print(len(made), 'torch' in sys.modules)\n"
    )
    environment = {**os.environ, "MFPTQ_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", code]
    first, second = (subprocess.run(run, env=environment, capture_output=True, check=True).stdout for _ in range(2))
    assert (first, second) == (b"2 False\n", b"0 False\n")


@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32"])
@pytest.mark.parametrize("method", ["search", "minmax"])
def test_many_weights_in_one_call_are_those_of_single_calls(method: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    sizes = [16, 32, 16 * 15, 16 * 16, 16 * 17, 16 * 100, 16]
    values = rng.standard_normal(sum(sizes)).astype(np.float32) * 0.02
    data = of_dtype(values, dtype)
    starts = np.cumsum([0, *sizes])
    kernel, scales = load_kernel(), (2.0 ** np.arange(7, 14)).astype(np.float32)
    packed, codes = np.full(data.size // 2, 0xEE, np.uint8), np.full(data.size // 16, 0xEE, np.uint8)
    stats = kernel.quantize_each(data, WeightBatch(method, starts, scales), packed, codes)
    largest = kernel.amax_each(data, starts)
    for row, (begin, end) in enumerate(itertools.pairwise(starts)):
        tile = data[begin:end].reshape(1, -1)
        own_packed, own_codes = np.empty((1, tile.size // 2), np.uint8), np.empty((1, tile.size // 16), np.uint8)
        found = kernel.quantize(tile, QuantizeArgs(method, float(scales[row])), own_packed, own_codes)
        assert np.array_equal(packed[begin // 2 : end // 2], own_packed[0])
        assert np.array_equal(codes[begin // 16 : end // 16], own_codes[0])
        assert np.array_equal(stats[row], found.as_array())
        assert largest[row] == kernel.amax(tile)


def of_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "uint16" else values.astype(dtype)


@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32"])
@pytest.mark.parametrize("parts", [0.001, 1, 2, 2.3])
def test_the_largest_magnitude_in_a_file_is_found_without_python(
    parts: float, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).standard_normal((4, int(parts * CACHED_BYTES) // 16)).astype(np.float32)
    data = of_dtype(values, dtype)
    kernel, memory = load_kernel(), np.empty_like(data)
    monkeypatch.setattr("mfptq.kernels.read_exact", None)
    for value, place in ((-7, 0), (-8, data.size // 3), (-9, data.size - 1)):
        data.reshape(-1)[place] = of_dtype(np.full(1, value, np.float32), dtype)[0]
        (tmp_path / "x").write_bytes(b"odd" + data.tobytes() + b"more")
        with (tmp_path / "x").open("rb") as file:
            assert kernel.amax_in_file(file.fileno(), 3, memory) == kernel.amax(data) == -value


def test_a_file_that_cannot_be_read_is_reported_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    memory = np.ones((1, 64), np.uint16)
    with (tmp_path / "x").open("rb") as file:
        with pytest.raises(EOFError):
            load_kernel().amax_in_file(file.fileno(), 0, memory)
        fd = file.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        load_kernel().amax_in_file(fd, 0, memory)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compares generations of x86-64")
@pytest.mark.parametrize(
    ("name", "processor", "fused"),
    sampled(
        [("search_BF16", "x86-64", False), ("minmax_BF16", "haswell", True)],
        [("minmax_BF16", "x86-64", False), ("search_BF16", "haswell", True)],
    ),
)
def test_older_processors_get_the_same_bytes(
    name: str, processor: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No vector of 512 bits, or none of 256 and no fused product either: chunks become more, and nothing else."""
    if fused and not has_fused():
        pytest.skip("this processor has no fused product")
    monkeypatch.setattr("mfptq.kernels.cpu_code.has_fused", lambda: fused)
    target = binding.Target.from_default_triple().create_target_machine(cpu=processor, opt=3, jit=True)
    module = ir.Module(name)
    emit(module, name)
    engine = binding.create_mcjit_compiler(optimized(module, target), target)
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 6, ctypes.c_int64)(engine.get_function_address(name))
    data = np.random.default_rng(1).integers(0, 2**16, 16 * 100, np.uint16)
    data[(data & 0x7F80) == 0x7F80] = 0
    results = []
    for call in (run, None):
        packed, codes, stats = np.empty(800, np.uint8), np.empty(100, np.uint8), np.empty((1, 7))
        scales, starts = np.array([2.0**-3], np.float32), np.array([0, 100])
        if call is None:
            many = WeightBatch(name.partition("_")[0], starts * 16, scales)
            stats = load_kernel().quantize_each(data, many, packed, codes)
        else:
            call(*(array.ctypes.data for array in (data, packed, codes, stats, starts, scales)), 1)
        results.append((packed.tobytes(), codes.tobytes(), stats.tobytes()))
    assert results[0] == results[1]


def one_lane(module: ir.Module, name: str) -> None:
    """Write a function with one block to a lane, as a GPU's thread has it: (source, packed, scales, statistics, blocks, scale)."""
    _, method, dtype = name.split("_")
    pointers = [element.as_pointer() for element in (WORD, WORD, BYTE, FLOAT)]
    function = ir.Function(module, ir.FunctionType(VOID, [*pointers, LONG, FLOAT]), name)
    source, packed, scales, known, blocks, factor = function.args
    code, words = Code(function, 1, fused=has_fused()), 16 if dtype == "F32" else 8
    build, size = code.build, 16 if method == "weighted" else 256
    with code.loop(LONG(0), blocks, LONG(1)) as block:
        start = build.mul(block, LONG(words))
        raw = [Words(code, code.load(code.at(source, build.add(start, LONG(k))), WORD, 4)) for k in range(words)]
        statistics = ColumnStatistics(code, code.at(known, build.mul(block, LONG(size))))
        done = calibrated(signed_values(raw, dtype), code.spread(factor), statistics, method)
        for half, word in enumerate(done.words):
            code.store(word.raw, code.at(packed, build.add(build.mul(block, LONG(2)), LONG(half))), 4)
        code.store(build.trunc(done.code.raw, BYTE), code.at(scales, block))
    build.ret_void()


@pytest.mark.parametrize(
    ("method", "dtype"),
    sampled(
        zip(
            LOCAL_METHODS, DTYPES, strict=True
        ),  # values are read the same for all methods, and each method reads them once
        [
            (method, dtype)
            for method, own in zip(LOCAL_METHODS, DTYPES, strict=True)
            for dtype in DTYPES
            if dtype != own
        ],
    ),
)
def test_one_lane_has_the_bytes_of_sixteen(
    method: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs in a GPU's thread is the same program with one lane: here as machine code of this processor."""
    monkeypatch.setenv("MFPTQ_CACHE_DIR", str(tmp_path))
    functions = CpuFunctions(one_lane, [*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_float])
    rng, columns = np.random.default_rng(3), 16 * 20
    mixing = rng.standard_normal((20, 16, 16)).astype(np.float32)
    values = mixing @ mixing.transpose(0, 2, 1)
    if method == "weighted":
        values = np.ascontiguousarray(np.diagonal(values, axis1=1, axis2=2).reshape(-1))
    weight = of_dtype((rng.standard_normal((1, columns)) * 0.02).astype(np.float32), np.dtype(DTYPES[dtype]).name)
    name = f"one_{FUNCTIONS[method]}_{dtype}"  # a name of its own: LLVM's engine knows functions by their names
    for factor in (2.0**13, 1234.5, 3e5):
        results = []
        for kernel in (None, load_kernel("cpu")):
            packed, codes = np.full((1, columns // 2), 0xEE, np.uint8), np.full((1, 20), 0xEE, np.uint8)
            if kernel is None:
                functions[name](*(each.ctypes.data for each in (weight, packed, codes, values)), 20, factor)
            else:
                kernel.quantize(weight, QuantizeArgs(method, factor, PreparedStatistics(values)), packed, codes)
            results.append((packed.tobytes(), codes.tobytes()))
        assert results[0] == results[1]


def one_row(module: ir.Module, name: str) -> None:
    """Write FEEDBACK with a row to a lane, as a GPU's thread has it: (source, packed, scales, records, blocks, rank, scale)."""
    dtype = name.rpartition("_")[2]
    pointers = [element.as_pointer() for element in (WORD, WORD, BYTE, FLOAT)]
    function = ir.Function(module, ir.FunctionType(VOID, [*pointers, LONG, LONG, FLOAT]), name)
    source, packed, scales, records, blocks, rank, factor = function.args
    code, words = Code(function, 1, fused=has_fused()), 16 if dtype == "F32" else 8
    build, sums = code.build, RowSums(code)
    sums.clear(rank)
    with code.loop(LONG(0), blocks, LONG(1)) as turn:
        record = Record.of(code, records, turn, rank)
        place = record.place()
        start = build.mul(place, LONG(words))
        raw = [Words(code, code.load(code.at(source, build.add(start, LONG(k))), WORD, 4)) for k in range(words)]
        done = with_feedback(signed_values(raw, dtype), code.spread(factor), record, sums)
        for half, word in enumerate(done.words):
            code.store(word.raw, code.at(packed, build.add(build.mul(place, LONG(2)), LONG(half))), 4)
        code.store(build.trunc(done.code.raw, BYTE), code.at(scales, place))
    build.ret_void()


@pytest.mark.parametrize("dtype", sampled(["BF16"], ["F16", "F32"]))
def test_one_lane_has_the_bytes_of_sixteen_with_feedback(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MFPTQ_CACHE_DIR", str(tmp_path))
    functions = CpuFunctions(one_row, [*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int64, ctypes.c_float])
    rng, columns, rank = np.random.default_rng(3), 16 * 20, 7
    mixing = rng.standard_normal((20, 16, 16)).astype(np.float32)
    factors = (rng.standard_normal((rank, columns)) / 4).astype(np.float32)
    records = feedback_statistics(mixing @ mixing.transpose(0, 2, 1), factors, 0.9)
    weight = of_dtype((rng.standard_normal((1, columns)) * 0.02).astype(np.float32), np.dtype(DTYPES[dtype]).name)
    for factor in (2.0**13, 1234.5):
        ours, theirs = ((np.full((1, 160), 0xEE, np.uint8), np.full((1, 20), 0xEE, np.uint8)) for _ in range(2))
        places = (each.ctypes.data for each in (weight, *ours, records))
        functions[f"one_row_{dtype}"](*places, 20, rank, factor)
        load_kernel("cpu").quantize(weight, QuantizeArgs(FEEDBACK, factor, PreparedStatistics(records)), *theirs)
        assert np.array_equal(ours[0], theirs[0])
        assert np.array_equal(ours[1], theirs[1])
