"""Inputs rounded to NVFP4: against the plain numpy reference of the format, at every edge of its scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mfptq.nvfp4 import E2M1_VALUES, E4M3_VALUES, e2m1_encode, e4m3_encode
from mfptq.observation.rounded_inputs import round_nvfp4


def reference(inputs: np.ndarray, scale: float) -> np.ndarray:
    """Round float32 `[..., K]`, block by block, by searching the tables of codes."""
    blocks = inputs.reshape(-1, 16).astype(np.float32)
    amax = np.abs(blocks).max(axis=1, keepdims=True)
    codes = e4m3_encode(np.minimum(amax / np.float32(6) * np.float32(scale), np.float32(448)))
    scales = E4M3_VALUES[codes]
    inverse = np.divide(np.float32(scale), scales, out=np.zeros_like(scales), where=scales != 0)
    values = E2M1_VALUES[e2m1_encode(np.abs(blocks) * inverse)]
    return (np.copysign(values, blocks) * (scales / np.float32(scale))).reshape(inputs.shape)


@pytest.mark.parametrize("scale", [0.37, 1.0, 8.0, 97.3, 4096.0])
def test_rounding_is_that_of_the_reference(scale: float) -> None:
    rng = np.random.default_rng(3)
    spread = np.exp2(rng.integers(-24, 12, (40, 8, 1)))  # from blocks that vanish to blocks that are clipped
    inputs = (rng.standard_normal((40, 8, 16)) * spread).astype(np.float32).reshape(5, 8, 128)
    inputs[0, 0] = 0
    found = round_nvfp4(torch.from_numpy(inputs), scale).numpy()
    np.testing.assert_array_equal(found, reference(inputs, scale))
    assert (found[1:] == 0).any()
    assert (np.abs(inputs) > 2688 / scale).any() == (scale > 0.5)


def test_ties_go_to_the_even_code() -> None:
    inputs = torch.tensor(
        [[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6]]
    )
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    found = round_nvfp4(inputs, 1.0)[0]
    assert found[:8].tolist() == expected
    assert (-found[8:]).tolist() == expected


def test_values_of_the_format_stay_as_they_are() -> None:
    values = torch.from_numpy(np.concatenate([E2M1_VALUES, -E2M1_VALUES])).to(torch.bfloat16)
    inputs = torch.stack([values * 2.0**power for power in (-3, 0, 4)])
    assert torch.equal(round_nvfp4(inputs, 8.0), inputs)
    assert round_nvfp4(inputs, 8.0).dtype == torch.bfloat16
