"""`minmax` against compressed-tensors itself, byte for byte; `search` against a plain brute force."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

import mfptq
from mfptq.kernels import QuantizeArgs, load_kernel
from mfptq.kernels.torch import TorchKernel
from mfptq.nvfp4 import (
    E2M1_VALUES,
    E4M3_VALUES,
    as_float32,
    minmax_global_scale,
    quantize_minmax,
    quantize_search,
    search_global_scale,
)

ARGS = QuantizationArgs(
    num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
)
KERNELS = [load_kernel(), TorchKernel()]


def library(weights: list[torch.Tensor]) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Quantize a fused group as the library does on a CPU: observer minima and maxima stay in the weight's dtype."""
    low = torch.stack([w.amin() for w in weights]).amin()
    high = torch.stack([w.amax() for w in weights]).amax()
    divisor = generate_gparam(low, high)
    results = []
    for weight in weights:
        blocks = weight.reshape(weight.shape[0], -1, 16)
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), ARGS, global_scale=divisor)
        scale = scale.to(torch.float8_e4m3fn)
        values = quantize(weight, scale.to(torch.float32), zero, ARGS, global_scale=divisor, dtype=weight.dtype)
        codes = scale.view(torch.uint8).numpy()
        results.append((pack_fp4_to_uint8(values).numpy(), codes, float(divisor.to(torch.float32))))
    return results


def ours(weights: list[torch.Tensor], method: str = "minmax") -> list[tuple[np.ndarray, np.ndarray, float]]:
    state = {f"l.{leaf}.weight": w for leaf, w in zip(("q_proj", "k_proj", "v_proj"), weights, strict=False)}
    done = mfptq.quantize_state_dict(state, [name.removesuffix(".weight") for name in state], method=method)
    return [
        (
            done[name + "_packed"].numpy(),
            done[name + "_scale"].view(torch.uint8).numpy(),
            float(done[name + "_global_scale"][0]),
        )
        for name in state
    ]


def cases() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(7)
    base = torch.randn(48, 128, generator=rng)
    zero_blocks, outliers, signed_zero = base.clone(), base.clone(), base.clone()
    zero_blocks[3, 16:48] = 0
    outliers[5, 5], outliers[6, 100] = 300, -1000
    signed_zero[2, ::3] = -0.0
    spread = base * torch.exp2(torch.randint(-30, 8, (48, 8), generator=rng).repeat_interleave(16, 1).float())
    return {
        "plain": base * 0.02,
        "zero blocks": zero_blocks,
        "zero tensor": torch.zeros(4, 32),
        "negative zeros": torch.full((2, 32), -0.0),
        "outliers": outliers,
        "signed zeros": signed_zero,
        "wide spread": spread,
        "tiny": base * 1e-30,
        "denormal": base * 1e-39,
        "one denormal": torch.zeros(2, 16).index_fill(1, torch.tensor([3]), 1e-40),
        "huge": base * 1e37,
        "ties": torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4).reshape(2, 16) * 0.5,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", cases())
def test_minmax_single_is_bit_equal(name: str, dtype: torch.dtype) -> None:
    weight = cases()[name].to(dtype)
    [(packed, codes, divisor)], [(our_packed, our_codes, our_divisor)] = library([weight]), ours([weight])
    assert our_divisor == divisor
    assert np.array_equal(our_codes, codes)
    assert np.array_equal(our_packed, packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_minmax_fused_is_bit_equal(dtype: torch.dtype) -> None:
    weights = [w.to(dtype) for name, w in cases().items() if name in ("plain", "outliers", "zero blocks")]
    for theirs, own in zip(library(weights), ours(weights), strict=True):
        assert theirs[2] == own[2]
        assert np.array_equal(theirs[1], own[1])
        assert np.array_equal(theirs[0], own[0])


@pytest.mark.parametrize("seed", range(20))
def test_minmax_random_bit_patterns_are_bit_equal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    exponents = rng.integers(90, 140, (16, 4)).repeat(16, axis=1).astype(np.uint16)
    bits = (rng.integers(0, 2, (16, 64)) << 15 | exponents << 7 | rng.integers(0, 128, (16, 64))).astype(np.uint16)
    weight = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    [(packed, codes, _)], [(our_packed, our_codes, _)] = library([weight]), ours([weight])
    assert np.array_equal(our_codes, codes)
    assert np.array_equal(our_packed, packed)


def stored_forms(weight: np.ndarray) -> list[np.ndarray]:
    bf16 = torch.from_numpy(weight).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16)
    return [bf16, half, weight] if np.isfinite(half).all() else [bf16, weight]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("name", cases())
def test_kernels_equal_the_reference(name: str, kernel) -> None:
    for weight in stored_forms(cases()[name].numpy()):
        amax = float(np.abs(as_float32(weight)).max())
        assert kernel.amax(weight) == amax
        dtype = {"uint16": "BF16", "float16": "F16", "float32": "F32"}[weight.dtype.name]
        for method, scale, reference in (
            ("search", search_global_scale(amax), quantize_search),
            ("minmax", minmax_global_scale(amax, dtype), quantize_minmax),
        ):
            packed = np.empty((weight.shape[0], weight.shape[1] // 2), np.uint8)
            codes = np.empty((weight.shape[0], weight.shape[1] // 16), np.uint8)
            kernel.quantize(weight, QuantizeArgs(method, scale), packed, codes)
            expected_packed, expected_codes = reference(weight, scale)
            assert np.array_equal(codes, expected_codes), (method, weight.dtype)
            assert np.array_equal(packed, expected_packed), (method, weight.dtype)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_is_never_hidden(kernel, value: float) -> None:
    for place in (0, 17, 255):
        weight = np.ones((2, 128), np.float32)
        weight.reshape(-1)[place] = value
        for stored in (weight, (weight.view(np.uint32) >> 16).astype(np.uint16), weight.astype(np.float16)):
            assert not np.isfinite(kernel.amax(stored))


def brute_force(blocks: np.ndarray, divisor: float) -> np.ndarray:
    """Return the least squared error of each block over every normal scale code."""
    best = np.full(len(blocks), np.inf, np.float32)
    middle = (E2M1_VALUES[1:] + E2M1_VALUES[:-1]) / 2
    for code in range(8, 127):
        scale = np.float32(E4M3_VALUES[code] / np.float32(divisor))
        nearest = E2M1_VALUES[np.searchsorted(middle, blocks * (np.float32(1) / scale))]
        error = np.zeros(len(blocks), np.float32)
        for i in range(16):
            difference = nearest[:, i] * scale - blocks[:, i]
            error += difference * difference
        best = np.minimum(best, error)
    return best


@pytest.mark.parametrize("name", ["plain", "outliers", "zero blocks"])
def test_search_loses_to_no_other_scale(name: str) -> None:
    rng = np.random.default_rng(3)
    weight = cases()[name].numpy() if name != "plain" else (rng.standard_normal((64, 512)) * 0.02).astype(np.float32)
    divisor = search_global_scale(float(np.abs(weight).max()))
    packed, codes = quantize_search(weight, divisor)
    from mfptq.nvfp4 import dequantize

    blocks = np.abs(weight.reshape(-1, 16))
    found = np.abs(dequantize(packed, codes, divisor).reshape(-1, 16))
    error = np.zeros(len(blocks), np.float32)
    for i in range(16):
        difference = found[:, i] - blocks[:, i]
        error += difference * difference
    worse = error > brute_force(blocks, divisor)
    share = worse.mean()
    assert share == 0, f"{worse.sum()} of {len(worse)} blocks worse"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("divisor", [3.7e3, 2.0**13, 2.0**20, 1e5, 0.3, 2.0**-20])
@pytest.mark.parametrize("blocks", [1, 7, 255, 256, 257, 300])
def test_any_divisor_and_any_number_of_blocks(kernel, divisor: float, blocks: int) -> None:
    weight = np.random.default_rng(blocks).standard_normal((1, 16 * blocks)).astype(np.float32) * 0.3
    for method, reference in (("search", quantize_search), ("minmax", quantize_minmax)):
        for stored in stored_forms(weight):
            packed, codes = np.empty((1, 8 * blocks), np.uint8), np.empty((1, blocks), np.uint8)
            stats = kernel.quantize(stored, QuantizeArgs(method, divisor), packed, codes)
            expected = reference(stored, divisor)
            assert np.array_equal(packed, expected[0])
            assert np.array_equal(codes, expected[1])
            assert stats.weights == weight.size
            assert stats.saturated_blocks == int((expected[1] == 126).sum())
            assert stats.zero_blocks == int((as_float32(stored).reshape(-1, 16) == 0).all(1).sum())
