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

from ..conftest import sampled
from ..encodings.checkpoints import spread

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


@pytest.mark.parametrize("seed", sampled(range(3), range(3, 10)))
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


DIAGONAL = list(zip(DTYPES, STRATEGIES, strict=True))


@pytest.mark.parametrize(
    ("dtype", "target"),
    sampled(DIAGONAL, [each for each in product(DTYPES, STRATEGIES) if each not in DIAGONAL]),
    ids=str,
)
def test_search_never_has_a_larger_error_in_any_segment(dtype: torch.dtype, target: str, tmp_path: Path) -> None:
    weights = {f"model.layers.{i}.mlp.down_proj.weight": each.to(dtype) for i, each in enumerate(cases().values())}
    weights = {name: each for name, each in weights.items() if each.isfinite().all()}
    weights |= {f"model.layers.{i + 20}.mlp.down_proj.weight": adversarial(i).to(dtype) for i in range(4)}
    stored = convert(tmp_path, weights, target, "search")
    better = 0
    for name, weight in weights.items():
        theirs = library(weight, STRATEGIES[target])
        assert stored[f"{name}_scale"].dtype == torch.float32
        errors = [
            squared_errors(weight, codes, scale, target)
            for codes, scale in ((stored[name], stored[f"{name}_scale"]), (theirs["weight"], theirs["weight_scale"]))
        ]
        assert (errors[0] <= errors[1] * (1 + 1e-12)).all(), name
        better += int((errors[0] < errors[1]).sum())
    assert better > (0 if target == "fp8-static" else 20) or dtype == torch.float32


def squared_errors(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, target: str) -> torch.Tensor:
    """Return the squared error of each segment of a format, in float64."""
    rows, columns = weight.shape
    height, width = {"fp8-dynamic": (1, columns), "fp8-block": (128, 128), "fp8-static": (rows, columns)}[target]
    factors = spread(scale.double().reshape(-(-rows // height), -(-columns // width)), (height, width), (rows, columns))
    padded = torch.zeros(-(-rows // height) * height, -(-columns // width) * width, dtype=torch.float64)
    padded[:rows, :columns] = (codes.double() * factors - weight.double()) ** 2
    return padded.reshape(-1, height, padded.shape[1] // width, width).sum((1, 3))


def adversarial(seed: int) -> torch.Tensor:
    """Return weights that lie at and around the middles between two codes, for scales around that of the largest."""
    rng = np.random.default_rng(seed)
    codes = fp8.E4M3_VALUES[rng.integers(0, 126, (260, 272))].astype(np.float64)
    steps = np.exp2(np.maximum(np.floor(np.log2(np.maximum(codes, 2.0**-9))), -6) - 3)
    values = codes + steps * rng.choice([0, 0.5, 0.5 - 2.0**-9, 0.5 + 2.0**-9, 0.25], codes.shape)
    values *= rng.choice([-1, 1], codes.shape) * rng.choice([1, 1.3, 2.0**-7], (260, 1))
    return torch.from_numpy((values * rng.uniform(0.5, 2) * 2.0 ** -rng.integers(0, 12)).astype(np.float32))


def test_blocks_of_search_have_powers_of_two_where_these_are_no_worse(tmp_path: Path) -> None:
    weight = cases()["rows apart"].to(torch.bfloat16)
    stored = convert(tmp_path, {"model.layers.0.mlp.down_proj.weight": weight}, "fp8-block", "search")
    scale = stored["model.layers.0.mlp.down_proj.weight_scale"].numpy()
    powers = 0
    for row, column in np.ndindex(scale.shape):
        values = weight[128 * row : 128 * row + 128, 128 * column : 128 * column + 128].float().abs().numpy()
        top = values.max(keepdims=True).reshape(1)
        both = power_scales(top), minmax_scales(top, "BF16")
        one, other = (
            np.square(
                fp8.dequantize(fp8.encode(values, each, "BF16", exact=False), each) - values, dtype=np.float64
            ).sum()
            for each in both
        )
        assert scale[row, column] == (both[1] if other < one else both[0])
        powers += one <= other
    assert 0 < powers < scale.size


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_errors_of_blocks_do_not_depend_on_how_they_are_cut(dtype: str) -> None:
    rng = np.random.default_rng(2)
    values = (rng.standard_normal((48, 256)) * np.exp2(rng.integers(-9, 9, (48, 1)))).astype(np.float32)
    data = stored_forms(values)[dtype].reshape(-1)
    scales, others = (rng.uniform(0.01, 2, 4).astype(np.float32) for _ in range(2))
    found = []
    for step, add in ((128, kernel.add_errors), (32, kernel.add_errors), (64, fp8.add_errors)):
        starts = np.arange(0, data.size + 1, step, dtype=np.int64)
        row, column = np.divmod(starts[:-1], 256)
        candidates = fp8.Candidates.of(scales, others)
        add(data, starts, row // 24 * 2 + column // 128, candidates)
        found.append(candidates)
    assert all(np.array_equal(each.sums, found[0].sums) for each in found)
    total = found[0].sums.sum(2)
    assert np.array_equal(found[0].best, np.where(total[:, 1] < total[:, 0], others, scales))


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


@pytest.mark.parametrize("count", sampled([12], [60]))
@pytest.mark.parametrize("kind", ["normal", "rows apart", "outliers", "heavy tails", "wide"])
def test_blocks_with_powers_of_two_are_served_as_they_are_and_no_worse_than_those_of_minmax(
    kind: str, count: int
) -> None:
    rng, errors = np.random.default_rng(5), {"search": 0.0, "minmax": 0.0}
    for _ in range(count):
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
