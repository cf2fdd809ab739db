"""Tensors times powers of two: exact in the normal range, rounded below it; the same however they are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mfptq.checkpoint.encoding import Region
from mfptq.dtypes import NUMPY_DTYPES
from mfptq.encodings.codes import scale_codes
from mfptq.encodings.smoothed import Powers, Smoothed
from mfptq.errors import SmoothingError
from mfptq.hub.opening import open_checkpoint
from mfptq.kernels.decode import load_decoder

ROWS, COLUMNS = 24, 80


@pytest.fixture(params=[scale_codes, load_decoder()], ids=["reference", "compiled"], autouse=True)
def scaler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SCALER", request.param)


SCALER = scale_codes


def decoded(
    folder: Path, tensor: torch.Tensor, powers: Powers, *regions: Region, strict: bool = False
) -> list[np.ndarray]:
    """Return regions of a tensor that is read times its factors."""
    folder.mkdir(exist_ok=True)
    save_file({"w": tensor}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    checkpoint = open_checkpoint(folder)
    [stored] = checkpoint.tensors()
    found = []
    for region in regions or (Region(0, stored.matrix.rows, 0, stored.matrix.columns),):
        out = np.empty(region.size, NUMPY_DTYPES[stored.info.dtype])
        Smoothed(stored, powers, strict=strict).decode(checkpoint.source, region, out, SCALER)
        found.append(out.reshape(region.rows, region.columns))
    checkpoint.source.close()
    return found


def floats(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values


def random(dtype: torch.dtype, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    values[..., ::7] = 0
    values[..., 3] = -0.0
    return values.to(dtype)


def factors(*shape: int, limit: int = 16) -> np.ndarray:
    return np.random.default_rng(1).integers(-limit, limit + 1, shape).astype(np.int8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor, powers = random(dtype), Powers(factors(ROWS), factors(1, COLUMNS))
    [found] = decoded(tmp_path, tensor, powers)
    exponents = powers.rows[:, None].astype(int) + powers.columns.astype(int)
    expected = np.ldexp(tensor.double().numpy(), exponents)
    assert (floats(found).astype(np.float64) == expected).all()
    assert (np.signbit(floats(found)) == np.signbit(expected)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_of_rows_alone_hold_for_all_their_columns(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor, powers = random(dtype), Powers(factors(ROWS), None)
    regions = Region(0, ROWS, 0, COLUMNS), Region(5, 1, 16, 48)
    for region, found in zip(regions, decoded(tmp_path, tensor, powers, *regions), strict=True):
        rows, columns = (
            slice(begin, begin + count) for begin, count in ((region.row, region.rows), (region.column, region.columns))
        )
        expected = np.ldexp(tensor.double().numpy()[rows, columns], factors(ROWS)[rows, None].astype(int))
        assert (floats(found).astype(np.float64) == expected).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_cut_gives_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor, powers = random(dtype, (4, ROWS // 4, COLUMNS)), Powers(factors(ROWS), factors(4, COLUMNS))
    [whole] = decoded(tmp_path, tensor, powers)
    regions = [Region(0, 5, 0, COLUMNS), Region(5, 19, 0, COLUMNS), Region(17, 1, 16, 48)]
    for region, part in zip(regions, decoded(tmp_path, tensor, powers, *regions), strict=True):
        columns = slice(region.column, region.column + region.columns)
        assert (part == whole[region.row : region.row + region.rows, columns]).all()


def test_each_slice_of_a_stack_has_its_own_factors(tmp_path: Path) -> None:
    tensor, columns = torch.ones(3, 2, 16), factors(3, 16)
    [found] = decoded(tmp_path, tensor, Powers(None, columns))
    assert (found == np.repeat(np.ldexp(np.float32(1), columns), 2, axis=0)).all()


def with_one(value: float, exponent: int, dtype: torch.dtype) -> tuple[torch.Tensor, Powers]:
    """Return a tensor with a value in row 7, column 21, and the factors of its columns."""
    tensor, exponents = random(dtype), np.zeros((1, COLUMNS), np.int8)
    tensor[7, 21], exponents[0, 21] = value, exponent
    return tensor, Powers(None, exponents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_beyond_the_range_is_refused_or_the_largest_number(
    sign: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensor, powers = with_one(sign * 3e38, 1, dtype)
    with pytest.raises(SmoothingError, match=r"row 7, column 21 times 2\^1 is larger than any number of"):
        decoded(tmp_path, tensor, powers, strict=True)
    [found] = decoded(tmp_path, tensor, powers)
    tensor[7, 21] = 1
    [expected] = decoded(tmp_path, tensor, powers)
    assert floats(found)[7, 21] == sign * torch.finfo(dtype).max
    assert (np.delete(found.reshape(-1), 7 * COLUMNS + 21) == np.delete(expected.reshape(-1), 7 * COLUMNS + 21)).all()


@pytest.mark.parametrize(
    ("value", "exponent", "dtype"),
    [
        (1.0078125 * 2.0**-120, -8, torch.bfloat16),
        (-(2.0**-133) * 3, -1, torch.bfloat16),
        (2.0**-133, -1, torch.bfloat16),
        ((1 + 2.0**-23) * 2.0**-120, -8, torch.float32),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_below_normal_numbers_products_are_rounded(
    value: float, exponent: int, dtype: torch.dtype, strict: bool, tmp_path: Path
) -> None:
    tensor, powers = with_one(value, exponent, dtype)
    assert tensor[7, 21] != 0
    [found] = decoded(tmp_path, tensor, powers, strict=strict)
    exact = tensor[7, 21].double() * 2.0**exponent
    assert float(floats(found)[7, 21]) == float(exact.to(dtype)) != float(exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay(value: float, tmp_path: Path) -> None:
    [found] = decoded(tmp_path, *with_one(value, -3, torch.bfloat16), strict=True)
    assert str(floats(found)[7, 21]) == str(value)


@pytest.mark.parametrize(
    ("value", "exponent"), [(2.0**-130, 20), (2.0**-126, -3), (2.0**-120, -10), (1.5 * 2.0**126, 1)]
)
def test_subnormal_and_largest_numbers_that_fit_are_exact(value: float, exponent: int, tmp_path: Path) -> None:
    [found] = decoded(tmp_path, *with_one(value, exponent, torch.bfloat16))
    assert float(floats(found)[7, 21]) == value * 2.0**exponent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_norm_with_an_offset_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor, exponents = random(dtype, (COLUMNS,)) / 4, factors(1, COLUMNS, limit=6)
    [found] = decoded(tmp_path, tensor, Powers(None, exponents, 1.0))
    exact = (tensor.double() + 1) * 2.0 ** torch.from_numpy(exponents[0]).double() - 1
    assert (torch.from_numpy(floats(found)[0].copy()).to(dtype) == exact.float().to(dtype)).all()


@pytest.mark.parametrize("columns", [16, 48, 80])
@pytest.mark.parametrize("each", [False, True])
def test_compiled_shifts_are_those_of_the_reference(columns: int, each: bool) -> None:
    """Of any bits: the same verdict, and where it is good, the same values."""
    rng = np.random.default_rng(columns)
    verdicts = set()
    for width in (16, 12, 9):
        bits = rng.integers(0, 2**width, (7, columns)).astype(np.uint16) << 3 | rng.integers(0, 8, (7, columns))
        bits = np.where(rng.random(bits.shape) < 0.1, 0x8000, (bits + 0x3000) & 0xBFFF).astype(np.uint16)
        shifts = (rng.integers(-4, 5, (7 if each else 1, columns)).astype(np.int16) << 7).view(np.uint16)
        found, expected = bits.copy(), bits.copy()
        verdict = load_decoder().shift(found, shifts)
        assert verdict == scale_codes.shift(expected, shifts)
        assert not verdict or (found == expected).all()
        verdicts.add(verdict)
    assert verdicts == {True, False}
