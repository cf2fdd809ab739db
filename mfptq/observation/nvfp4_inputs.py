"""Emulate what an engine does to the inputs of a W4A4 layer: quantize them to NVFP4, one token at a time.

Called by `rounded_inputs`. The result is what the engine multiplies, in the dtype of the computation; no kernel is timed here.
"""

from __future__ import annotations

import torch

from ..nvfp4 import BLOCK_SIZE, E2M1_MAX, E4M3_MAX


def round_inputs(inputs: torch.Tensor, input_global_scale: float) -> torch.Tensor:
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
