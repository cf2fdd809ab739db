"""What LLVM makes of the kernels: nothing contracted, nothing recompiled, the same from damaged caches and on old processors."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from llvmlite import binding, ir

from mfptq.kernels import QuantizeArgs, WeightBatch, load_kernel, machine
from mfptq.kernels.compiling import _target, has_fused, load, object_code, optimized
from mfptq.kernels.cpu import CACHED_BYTES
from mfptq.kernels.cpu_code import emit
from mfptq.kernels.cuda import _ptx
from mfptq.kernels.linking import CannotLinkError, link
from mfptq.kernels.ptx import compile_ptx


@pytest.fixture(scope="module")
def text() -> str:
    return compile_ptx().decode()


def test_ptx_has_every_kernel_and_rounds_as_ieee_754_says(text: str) -> None:
    entries = set(re.findall(r"\.entry (\w+)\(", text))
    kinds = ("bf16", "f16", "f32")
    assert entries == {f"{m}_{k}" for m in ("search", "minmax") for k in kinds} | {"amax_16", "amax_32"}
    used = Counter(re.findall(r"^\s+(?:@%p\d+ )?(\w+)\.([\w.]*f(?:32|64))\b", text, re.MULTILINE))
    for (operation, kind), _ in used.items():
        if operation in ("add", "sub", "mul", "div", "fma", "rcp", "sqrt"):
            assert kind in ("rn.f32", "rn.f64"), f"{operation}.{kind} may be contracted, approximated or flushed"
    assert ".ftz" not in text
    assert ".approx" not in text


def test_fused_products_are_only_where_they_are_exact(text: str) -> None:
    parts = dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", text, re.DOTALL))
    for name, part in parts.items():
        count = len(re.findall(r"\bfma\.rn\.f32", part))
        # ten candidates of sixteen values: two to round each, on either path, and one for its error on the simple one;
        # then one for each value's code. minmax: a value's code, and what it stands for
        expected = {"search": 10 * 16 * (2 + 2 + 1) + 16, "minmax": 16 * (1 + 1), "amax": 0}
        assert count == expected[name.split("_")[0]], name


def test_ptx_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MFPTQ_CACHE_DIR", str(tmp_path))
    assert _ptx().decode() == text
    monkeypatch.setattr("mfptq.kernels.ptx.compile_ptx", lambda: pytest.fail("compiled again"))
    assert _ptx().decode() == text


@pytest.mark.parametrize("name", ["search_bf16", "minmax_f16", "search_f32"])
def test_cpu_code_contracts_nothing(name: str) -> None:
    module = ir.Module(name)
    emit(module, name)
    written = str(optimized(module, _target()))
    operations = re.findall(r"= (f(?:add|sub|mul|div|neg)) ([a-z ]*?)<", written)
    assert operations
    assert {flags for _, flags in operations} == {""}, "fast-math flags"


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    code = (
        "import numpy as np\n"
        "import sys\n"
        "from mfptq.kernels import QuantizeArgs, load_kernel\n"
        "made = []\n"
        "from mfptq.kernels.machine import MachineCode\n"
        "original = MachineCode._compile\n"
        "MachineCode._compile = lambda *a: (made.append(1), original(*a))[1]\n"
        "kernel = load_kernel()\n"
        "kernel.amax(np.zeros((1, 16), np.uint16))\n"
        "kernel.quantize(np.zeros((1, 16), np.uint16), QuantizeArgs('search', 1.0), np.empty((1, 8), np.uint8), np.empty((1, 1), np.uint8))\n"
        "print(len(made), *(name in sys.modules for name in ('torch', 'llvmlite.ir', 'llvmlite.binding')))\n"
    )
    environment = {**os.environ, "MFPTQ_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", code]
    first, second = (subprocess.run(run, env=environment, capture_output=True, check=True).stdout for _ in range(2))
    assert first == b"2 False True True\n"
    linux = sys.platform == "linux" and platform.machine() == "x86_64"
    assert second == (b"0 False False False\n" if linux else b"0 False False True\n")


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
@pytest.mark.parametrize(("processor", "fused"), [("x86-64", False), ("haswell", True)])
@pytest.mark.parametrize("name", ["search_bf16", "minmax_bf16"])
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


@pytest.fixture(scope="module")
def code() -> bytes:
    module = ir.Module("search_bf16")
    emit(module, "search_bf16")
    return object_code(module)


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="elsewhere LLVM links")
def test_linked_code_is_what_llvm_loads(code: bytes) -> None:
    results = []
    data = np.random.default_rng(2).standard_normal(16 * 37).astype(np.float32).view(np.uint32) >> 16
    source, starts, scales = data.astype(np.uint16), np.array([0, 20, 37]), np.array([2.0**5, 100.0], np.float32)
    for place in (link(code, "search_bf16"), load(code, "search_bf16")):
        run = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 6, ctypes.c_int64)(place)
        packed, codes, stats = np.zeros(8 * 37, np.uint8), np.zeros(37, np.uint8), np.zeros((2, 7))
        run(*(array.ctypes.data for array in (source, packed, codes, stats, starts, scales)), 2)
        results.append((packed.tobytes(), codes.tobytes(), stats.tobytes()))
    assert results[0] == results[1]


def test_what_is_no_object_file_for_this_machine_is_not_linked(code: bytes) -> None:
    with pytest.raises(CannotLinkError):
        link(code, "another_name")
    for size in (0, 7, 16, 63, len(code) // 2, len(code) - 1):
        with pytest.raises(CannotLinkError):
            link(code[:size], "search_bf16")
    for place in (0, 4, 16, 18):  # magic number, class, type, machine
        changed = bytearray(code)
        changed[place] ^= 0xFF
        with pytest.raises(CannotLinkError):
            link(bytes(changed), "search_bf16")


def test_an_address_that_is_not_known_is_not_linked(code: bytes) -> None:
    with pytest.raises(CannotLinkError):
        link(code.replace(b"memcpy", b"memcpx"), "search_bf16")


def test_where_nothing_can_be_linked_llvm_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_code: bytes, _name: str) -> int:
        raise CannotLinkError

    monkeypatch.setattr("mfptq.kernels.machine.link", refuse)
    functions = machine.MachineCode(emit, [*[ctypes.c_void_p] * 6, ctypes.c_int64])
    source, starts, scales = np.full(16, 0x3F80, np.uint16), np.array([0, 1]), np.array([2.0**6], np.float32)
    packed, codes, stats = np.zeros(8, np.uint8), np.zeros(1, np.uint8), np.zeros((1, 7))
    functions["search_bf16"](*(a.ctypes.data for a in (source, packed, codes, stats, starts, scales)), 1)
    assert stats[0, 1] == 16.0


def test_a_processor_is_known_by_its_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = "processor : 0\nmodel : 7\nflags : fma avx\ncpu MHz : {}\n\nprocessor : 1\nflags : none\n"
    found = []
    for number, text in enumerate((told.format(1), told.format(2), told.replace("avx", "sse"), "processor : 0\n")):
        path = tmp_path / str(number)
        path.write_text(text)
        monkeypatch.setattr(machine, "CPUINFO", path)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        found.append(machine._processor())
    assert found[0] == found[1] != found[2]
    assert found[3] is None
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert machine._processor() is None
