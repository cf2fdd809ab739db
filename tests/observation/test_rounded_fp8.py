"""Rounding of inputs to FP8, against a reference in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mfptq.fp8 import dequantize, encode
from mfptq.observation.rounded_inputs import round_dynamic, round_static, rounding
from mfptq.planning.formats import FORMATS


def reference(inputs: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return float32 activations at scales that broadcast against them, as E4M3 holds them."""
    safe = np.where(scale == 0, 1, scale).astype(np.float32)
    codes = encode(np.abs(inputs), np.broadcast_to(safe, inputs.shape), "F32", exact=False)
    return np.copysign(dequantize(codes, np.broadcast_to(scale, inputs.shape).astype(np.float32)), inputs)


def activations(columns: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((2, 7, columns), generator=generator) * torch.rand((2, 7, 1), generator=generator) * 50
    x[0, 0] = 0
    x[0, 1, 5] = 1e4
    x[1, 2] *= 1e-6
    return x


def test_tokens_are_scaled_one_by_one() -> None:
    x = activations()
    scale = np.abs(x.numpy()).max(axis=-1, keepdims=True) / np.float32(448)
    np.testing.assert_array_equal(round_dynamic(x).numpy(), reference(x.numpy(), scale))


def test_columns_are_scaled_128_at_a_time() -> None:
    x = activations()
    found = round_dynamic(x, 128).numpy()
    for start in (0, 128, 256):
        part = x.numpy()[..., start : start + 128]
        scale = np.abs(part).max(axis=-1, keepdims=True) / np.float32(448)
        np.testing.assert_array_equal(found[..., start : start + 128], reference(part, scale))


def test_a_fixed_scale_clamps_what_is_larger() -> None:
    x = activations()
    found = round_static(x, 0.05)
    np.testing.assert_array_equal(found.numpy(), reference(x.numpy(), np.float32(0.05)))
    assert float(found.abs().max()) == pytest.approx(448 * 0.05)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_rounds_inputs_as_its_config_says(name: str) -> None:
    x = activations(320).to(torch.bfloat16)
    target = FORMATS[name]
    found = rounding(target, 0.5 if target.needs_input_scales else None)(x)
    assert found.dtype == x.dtype
    assert torch.equal(found, x) == (target.inputs is None)
    expected = {"fp8-dynamic": round_dynamic(x), "fp8-block": round_dynamic(x, 128), "fp8-static": round_static(x, 0.5)}
    if name in expected:
        assert torch.equal(found, expected[name])
