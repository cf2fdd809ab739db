"""Emulate what engines do to the inputs of a layer, by its weight's format: the result is what they multiply.

Called by `quantized`, and by `sensitivity` for NVFP4. Results have the dtype of the computation; no kernel is timed here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..nvfp4 import BLOCK_SIZE, E2M1_MAX, E4M3_MAX
from ..planning.formats import TargetFormat


def rounding(target: TargetFormat, scale: float | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what a format does to activations `[..., K]`; `scale` is what an output stores for them, None for nothing."""
    if target.inputs is None:
        return _unchanged
    if scale is None:
        return partial(round_dynamic, width=target.inputs["group_size"] or 0)
    if target.family == "nvfp4":
        return partial(round_nvfp4, input_global_scale=scale)
    return partial(round_static, scale=scale)


def _unchanged(inputs: torch.Tensor) -> torch.Tensor:
    return inputs


def round_nvfp4(inputs: torch.Tensor, input_global_scale: float) -> torch.Tensor:
    """Return activations `[..., K]` as NVFP4 holds them, in the same dtype; K is a multiple of 16.

    A block's scale is `input_global_scale * amax / 6`, at most 448, rounded to E4M3 with its subnormals; values are rounded
    to E2M1, nearest, ties to even, and clamped at 6. A block whose scale rounds to 0 becomes 0. As vLLM's kernel
    `scaled_fp4_quant`; products and divisions are float32.
    """
    blocks = inputs.float().reshape(-1, BLOCK_SIZE)
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    scale = (amax / E2M1_MAX * input_global_scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    inverse = torch.where(scale == 0, scale, input_global_scale / scale)
    rounded = _round_e2m1((blocks * inverse).clamp(-E2M1_MAX, E2M1_MAX))
    return (rounded * (scale / input_global_scale)).reshape(inputs.shape).to(inputs.dtype)


def _round_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Round values within +-6 to E2M1: steps of 0.5 below 2, of 1 below 4, of 2 above; `round` takes ties to even."""
    magnitudes = values.abs()
    fine, middle, coarse = (values * 2).round() / 2, values.round(), (values / 2).round() * 2
    return torch.where(magnitudes < 2, fine, torch.where(magnitudes < 4, middle, coarse))


def round_dynamic(inputs: torch.Tensor, width: int = 0) -> torch.Tensor:
    """Return activations `[..., K]` as E4M3 holds them, each `width` columns of a token scaled to their largest magnitude.

    0 stands for all columns. The last columns of a token may be fewer. As vLLM's dynamic quantization: scales and quotients are
    float32, rounded to nearest, ties to even.
    """
    if not width:
        scale = inputs.float().abs().amax(dim=-1, keepdim=True) / E4M3_MAX
        return _rounded(inputs, scale)
    return torch.cat([round_dynamic(part) for part in torch.split(inputs, width, dim=-1)], dim=-1)


def round_static(inputs: torch.Tensor, scale: float) -> torch.Tensor:
    """Return activations as E4M3 holds them at a fixed scale: what is larger than 448 times it is clamped."""
    return _rounded(inputs, torch.full((), scale, device=inputs.device))


def _rounded(inputs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (inputs.float() / safe).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(inputs.dtype)
