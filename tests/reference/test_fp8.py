"""FP8 with `minmax` against compressed-tensors' own compressor, byte for byte, by whole conversions; the kernel against numpy."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

import mfptq
from mfptq import fp8
from mfptq.fp8 import Segments, minmax_scales, power_scales, search_scales
from mfptq.kernels import fp8 as kernel
from mfptq.kernels.fp8 import quantize_fp8

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STRATEGIES = {"fp8-dynamic": "channel", "fp8-block": "block", "fp8-static": "tensor"}


def cases() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    base = torch.randn(300, 208, generator=rng)
    rows = base * torch.exp2(torch.randint(-20, 12, (300, 1), generator=rng).float())
    zeros, outliers, top = base.clone(), base.clone(), base.clone()
    zeros[5:140], zeros[200, 16:48] = 0, 0
    outliers[5, 5], outliers[150, 100] = 3000, -10000
    top[::2, 0] = 448
    return {
        "plain": base * 0.02,
        "one block": base[:128, :128],
        "rows apart": rows,
        "zero rows": zeros,
        "zero tensor": torch.zeros(4, 32),
        "negative zeros": torch.where(base < 0, torch.tensor(-0.0), base),
        "outliers": outliers,
        "tiny": base * 1e-30,
        "denormal": base * 1e-39,
        "subnormal codes": base * torch.exp2(torch.randint(-14, 1, base.shape, generator=rng).float()),
        "huge": base * 1e37,
        "at 448": top,
        "ragged": base[:131, :144],
        "a row": base[:1, :16],
    }


def library(weight: torch.Tensor, strategy: str) -> dict[str, torch.Tensor]:
    """Quantize as the library does on a CPU: ranges stay in the weight's dtype, ragged blocks have what is there."""
    args = QuantizationArgs(
        num_bits=8, type="float", symmetric=True, strategy=strategy,
        block_structure=[128, 128] if strategy == "block" else None,
    )  # fmt: skip
    if strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif strategy == "tensor":
        low, high = weight.amin().reshape(1), weight.amax().reshape(1)
    else:
        tiles = [list(row.split(128, 1)) for row in weight.split(128, 0)]
        low, high = (
            torch.stack([torch.stack([f(part) for part in row]) for row in tiles]) for f in (torch.amin, torch.amax)
        )
    scale, _ = calculate_qparams(low, high, args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)


def convert(folder: Path, weights: dict[str, torch.Tensor], target: str, method: str) -> dict[str, torch.Tensor]:
    (folder / "source").mkdir(parents=True)
    save_file(
        {name: each.contiguous() for name, each in weights.items()},
        folder / "source" / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "source" / "config.json").write_text("{}")
    scales = {name.removesuffix(".weight"): 100.0 for name in weights}
    (folder / "scales.json").write_text(
        json.dumps({f"{name}.input_global_scale": each for name, each in scales.items()})
    )
    given = {"input_scales": folder / "scales.json"} if target == "fp8-static" else {}
    mfptq.convert(folder / "source", folder / "out", formats=[f"{target}=re:.*"], method=method, **given)
    assert mfptq.verify(folder / "out", folder / "source").ok or method == "minmax"
    return load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize(("target", "dtype"), list(product(STRATEGIES, DTYPES)), ids=str)
def test_minmax_is_bit_equal(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {f"model.layers.{i}.mlp.down_proj.weight": each.to(dtype) for i, each in enumerate(cases().values())}
    weights = {name: each for name, each in weights.items() if each.isfinite().all()}
    assert len(weights) >= 12
    stored = convert(tmp_path, weights, target, "minmax")
    different = {}
    for name, weight in weights.items():
        case = list(cases())[int(name.split(".")[2])]
        theirs = library(weight, STRATEGIES[target])
        codes, scale = stored[name], stored[f"{name}_scale"]
        assert codes.dtype == torch.float8_e4m3fn
        assert scale.dtype == (torch.float32 if target == "fp8-static" else dtype)
        assert scale.shape == theirs["weight_scale"].shape
        different[case] = int((codes.view(torch.uint8) != theirs["weight"].view(torch.uint8)).sum())
        different[f"{case}, scales"] = int((scale.double() != theirs["weight_scale"].double()).sum())
    assert {case: count for case, count in different.items() if count} == {}


@pytest.mark.parametrize("seed", range(10))
def test_minmax_of_random_bit_patterns_is_bit_equal(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, (64, 96)).astype(np.uint16)
    weight = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    weight = torch.where(weight.isfinite(), weight, 1.0)
    stored = convert(tmp_path, {"model.layers.0.mlp.down_proj.weight": weight}, "fp8-dynamic", "minmax")
    theirs = library(weight, "channel")
    assert torch.equal(
        stored["model.layers.0.mlp.down_proj.weight"].view(torch.uint8), theirs["weight"].view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_search_never_has_a_larger_error_in_any_row(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {f"model.layers.{i}.mlp.down_proj.weight": each.to(dtype) for i, each in enumerate(cases().values())}
    weights = {name: each for name, each in weights.items() if each.isfinite().all()}
    stored = convert(tmp_path, weights, "fp8-dynamic", "search")
    better = 0
    for name, weight in weights.items():
        theirs = library(weight, "channel")
        assert stored[f"{name}_scale"].dtype == torch.float32
        exact = weight.double()
        errors = [
            ((codes.double() * scale.double() - exact) ** 2).sum(1)
            for codes, scale in ((stored[name], stored[f"{name}_scale"]), (theirs["weight"], theirs["weight_scale"]))
        ]
        assert (errors[0] <= errors[1] * (1 + 1e-6)).all(), name
        better += int((errors[0] < errors[1]).sum())
    assert better > 100 or dtype == torch.float32


def test_blocks_of_search_have_powers_of_two_that_keep_all_in_range(tmp_path: Path) -> None:
    weight = cases()["rows apart"].to(torch.bfloat16)
    stored = convert(tmp_path, {"model.layers.0.mlp.down_proj.weight": weight}, "fp8-block", "search")
    scale = stored["model.layers.0.mlp.down_proj.weight_scale"].numpy()
    assert (np.frexp(scale)[0] == 0.5).all()
    for row, column in np.ndindex(scale.shape):
        top = weight[128 * row : 128 * row + 128, 128 * column : 128 * column + 128].float().abs().max()
        assert top / 448 <= scale[row, column] < top / 224


def random_block(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return magnitudes of a 128x128 block of bfloat16 weights."""
    values = rng.standard_normal((128, 128))
    if kind == "rows apart":
        values *= np.exp2(rng.integers(-8, 8, (128, 1)))
    elif kind == "outliers":
        values[rng.random(values.shape) < 0.002] *= rng.uniform(5, 300)
    elif kind == "heavy tails":
        values = rng.standard_t(2, values.shape)
    elif kind == "wide":
        values *= np.exp2(rng.uniform(-12, 2, values.shape))
    weight = torch.from_numpy(values * 2.0 ** rng.uniform(-10, 3)).to(torch.bfloat16)
    return np.abs(weight.float().numpy())


def served(values: np.ndarray, stored: np.ndarray, *, exact: bool) -> np.ndarray:
    """Return what engines compute with whose kernels need powers of two: the stored block, rounded again to such a scale."""
    once = fp8.dequantize(fp8.encode(values, stored, "BF16", exact=exact), stored)
    scale = power_scales(np.array([once.max()], np.float32))
    return fp8.dequantize(fp8.encode(once, scale, "F32", exact=False), scale)


@pytest.mark.parametrize("kind", ["normal", "rows apart", "outliers", "heavy tails", "wide"])
def test_blocks_of_search_are_served_as_they_are_and_no_worse_than_those_of_minmax(kind: str) -> None:
    rng, errors = np.random.default_rng(5), {"search": 0.0, "minmax": 0.0}
    for _ in range(60):
        values = random_block(kind, rng)
        amax = np.array([values.max()], np.float32)
        ours, theirs = power_scales(amax), minmax_scales(amax, "BF16")
        found = served(values, ours, exact=False)
        assert np.array_equal(found, fp8.dequantize(fp8.encode(values, ours, "BF16", exact=False), ours))
        one, other = (
            float(np.square(each - values, dtype=np.float64).sum())
            for each in (found, served(values, theirs, exact=True))
        )
        assert one <= other
        errors["search"] += one / float(np.square(values, dtype=np.float64).sum())
        errors["minmax"] += other / float(np.square(values, dtype=np.float64).sum())
    assert errors["search"] < errors["minmax"]


def stored_forms(values: np.ndarray) -> dict[str, np.ndarray]:
    bf16 = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return {"BF16": bf16, "F16": np.clip(values, -6e4, 6e4).astype(np.float16), "F32": values}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_compiled_kernel_equals_the_reference(dtype: str, exact: bool) -> None:
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((64, 512)) * np.exp2(rng.integers(-20, 12, (64, 1)))).astype(np.float32)
    values[5], values[6, 3], values[7], values[8] = 0, -0.0, values[7] * 1e-30, values[8] * 1e25
    data = stored_forms(values)[dtype].reshape(-1)
    starts = np.concatenate([[0], np.cumsum(rng.integers(1, 33, 200) * 16)]).astype(np.int64)
    starts = np.append(starts[starts < data.size], data.size).astype(np.int64)
    x = np.abs(fp8.as_float32(data))
    amax = np.maximum.reduceat(x, starts[:-1])
    scales = minmax_scales(amax, dtype) if exact else search_scales(amax)
    segments = Segments(starts, scales, minmax_scales(amax, dtype), exact)
    codes, plain = np.empty(data.size, np.uint8), np.empty(data.size, np.uint8)
    chosen, stats = quantize_fp8(data, segments, codes)
    expected, reference = kernel._plain(data, segments, plain)
    assert np.array_equal(codes, plain)
    assert np.array_equal(chosen, expected)
    assert exact or dtype == "F32" or (chosen != scales).any()
    assert stats.relative_error == pytest.approx(reference.relative_error, rel=1e-6)
    assert (stats.weights, stats.zeroed, stats.zero_blocks) == (data.size, reference.zeroed, reference.zero_blocks)
    assert stats.worst_block == pytest.approx(reference.worst_block, rel=1e-6)
    place = data.copy()
    found, _ = quantize_fp8(place, segments, place.view(np.uint8)[: data.size])
    assert np.array_equal(place.view(np.uint8)[: data.size], codes), "codes may take the place of the values"
    assert np.array_equal(found, chosen)


def test_codes_are_those_of_torch() -> None:
    values = np.concatenate([np.linspace(0, 448, 100_001), 448 * np.exp2(-np.linspace(0, 30, 100_001))]).astype(
        np.float32
    )
    ours = fp8.encode(values, np.ones(1, np.float32), "F32", exact=False)
    assert np.array_equal(ours, torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy())


def test_powers_of_two_at_the_boundary() -> None:
    amax = np.array([448, np.nextafter(np.float32(448), np.float32(500)), 224, 0, 3.4e38, 1e-44], np.float32)
    assert power_scales(amax).tolist()[:4] == [1.0, 2.0, 0.5, 2.0**-23]
    assert (amax / power_scales(amax) <= 448).all()
