"""The compiled decoder and the numpy reference, byte for byte, on every code and on hostile scales."""

import numpy as np
import pytest
import torch

from mfptq.encodings.codes import CODE_FORMATS, E2M1, E4M3, E8M0_VALUES, bf16_bits, scale_codes, scale_values

from .checkpoints import DECODERS

SHAPES = [(2048, 128), (2048, 32), (300, 128), (576, 128), (48, 48), (16, 16), (130, 128), (34, 2)]


def scales(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = (np.exp2(rng.integers(-140, 120, (rows, columns))) * rng.standard_normal((rows, columns))).astype("f4")
    found[:6, 0] = [np.nan, np.inf, 0, 1e-39, -np.inf, 3e38]
    return found


@pytest.mark.parametrize(("columns", "run"), SHAPES)
@pytest.mark.parametrize("codes", CODE_FORMATS)
def test_decoders_agree_also_in_place(codes: str, columns: int, run: int) -> None:
    rows, bits = 40, CODE_FORMATS[codes].bits
    packed = np.random.default_rng(1).integers(0, 256, rows * columns * bits // 8, dtype=np.uint8)
    factors = scales(rows, -(-columns // run))
    expected = np.empty((rows, columns), np.uint16)
    scale_codes(codes, packed, factors, expected, run=run)
    for decoder in DECODERS:
        memory = np.empty(2 * expected.size, np.uint8)
        memory[-packed.size :] = packed
        found = memory.view(np.uint16).reshape(rows, columns)
        decoder(codes, memory[-packed.size :], factors, found, run=run)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(("columns", "run"), SHAPES)
@pytest.mark.parametrize("codes", CODE_FORMATS)
def test_decoders_agree_on_float32(codes: str, columns: int, run: int) -> None:
    rows, bits = 40, CODE_FORMATS[codes].bits
    packed = np.random.default_rng(1).integers(0, 256, rows * columns * bits // 8, dtype=np.uint8)
    factors = scales(rows, -(-columns // run))
    found = [np.empty((rows, columns), np.float32) for _ in DECODERS]
    for decoder, out in zip(DECODERS, found, strict=True):
        decoder(codes, packed, factors, out, run=run)
    assert np.array_equal(*found, equal_nan=True)
    narrow = np.empty((rows, columns), np.uint16)
    scale_codes(codes, packed, factors, narrow, run=run)
    assert np.array_equal(bf16_bits(found[0]), narrow)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_e4m3_code_is_torchs(decoder) -> None:
    packed = np.arange(256, dtype=np.uint8)
    found = np.empty((1, 256), np.uint16)
    decoder(E4M3, packed, np.ones((1, 1), np.float32), found, run=256)
    torchs = torch.from_numpy(packed).view(torch.float8_e4m3fn).to(torch.bfloat16)
    ours = torch.from_numpy(found[0]).view(torch.bfloat16)
    assert torch.equal(torch.nan_to_num(ours, 1e9), torch.nan_to_num(torchs, 1e9))
    assert np.flatnonzero(np.isnan(ours.float().numpy())).tolist() == [0x7F, 0xFF]
    assert found[0, 0x80] == 0x8000  # minus zero


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_e2m1_code(decoder) -> None:
    packed = np.array([low | (low ^ 8) << 4 for low in range(16)], np.uint8)
    found = np.empty((1, 32), np.uint16)
    decoder(E2M1, packed, np.ones((1, 1), np.float32), found, run=32)
    values = torch.from_numpy(found[0]).view(torch.bfloat16).float().tolist()
    assert values[0:16:2] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert values[1:16:2] == [0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_one_byte_scales_are_exponents_whatever_they_are_called() -> None:
    every = np.arange(256, dtype=np.uint8)
    torchs = torch.from_numpy(every).view(torch.float8_e8m0fnu).float().numpy()
    for dtype in ("U8", "F8_E8M0"):
        assert np.array_equal(scale_values(every, dtype), torchs, equal_nan=True)
    assert E8M0_VALUES[0] == 2.0**-127
    assert np.isnan(E8M0_VALUES[255])
