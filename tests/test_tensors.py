"""The functions for tensors in hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mfptq
from mfptq.errors import NonFiniteWeightError, UnsupportedTensorError, UsageError


@pytest.mark.parametrize("method", ["search", "minmax"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_torch_and_numpy_agree_and_come_back(method: str, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 64, dtype=torch.float32).mul(0.1).to(dtype)
    array = weight.view(torch.uint16).numpy() if dtype is torch.bfloat16 else weight.numpy()
    one, other = mfptq.quantize_nvfp4(weight, method=method), mfptq.quantize_nvfp4(array, method=method)
    assert one.scale.dtype is torch.float8_e4m3fn
    assert np.array_equal(one.packed.numpy(), other.packed)
    assert np.array_equal(one.scale.view(torch.uint8).numpy(), other.scale)
    assert one.global_scale == other.global_scale
    back, found = mfptq.dequantize_nvfp4(one), mfptq.dequantize_nvfp4(other)
    assert isinstance(back, torch.Tensor)
    assert np.array_equal(back.numpy(), found)
    error = float((back - weight.float()).norm() / weight.float().norm())
    assert error == pytest.approx(one.stats.relative_error, rel=1e-4)
    assert 0.05 < error < 0.12


def test_a_column_major_view_is_what_it_says() -> None:
    weight = torch.randn(64, 32).t()
    assert torch.equal(mfptq.quantize_nvfp4(weight).packed, mfptq.quantize_nvfp4(weight.contiguous()).packed)


def test_state_dict_shares_scales_between_fused_partners_only() -> None:
    state = {
        "a.q_proj.weight": torch.randn(16, 32),
        "a.k_proj.weight": torch.randn(16, 32) * 8,
        "a.o_proj.weight": torch.randn(16, 32),
        "norm.weight": torch.ones(32),
    }
    done = mfptq.quantize_state_dict(state, ["a.q_proj", "a.k_proj", "a.o_proj"])
    scales = {name: float(done[f"a.{name}.weight_global_scale"][0]) for name in ("q_proj", "k_proj", "o_proj")}
    assert scales["q_proj"] == scales["k_proj"] < scales["o_proj"]
    assert done["norm.weight"] is state["norm.weight"]
    assert "a.q_proj.weight" not in done
    assert "a.q_proj.weight" in state


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        (np.ones((4, 24), np.float32), UnsupportedTensorError),
        (np.ones((4, 16), np.float64), UnsupportedTensorError),
        (np.ones((4,), np.float32), UnsupportedTensorError),
        (np.ones((0, 16), np.float32), UnsupportedTensorError),
        (np.full((1, 16), np.nan, np.float32), NonFiniteWeightError),
        (np.full((1, 16), np.inf, np.float16), NonFiniteWeightError),
    ],
)
def test_what_cannot_be_quantized_is_refused(weight: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error):
        mfptq.quantize_nvfp4(weight)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="best"):
        mfptq.quantize_nvfp4(np.ones((1, 16), np.float32), method="best")
    with pytest.raises(UsageError, match=r"b\.c"):
        mfptq.quantize_state_dict({}, ["b.c"])
