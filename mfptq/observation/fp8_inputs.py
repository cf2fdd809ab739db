"""Emulate what an engine does to the inputs of an FP8 layer: round them to E4M3, scaled by token, by 128 columns, or by one number.

Called by `rounded_inputs`. The result is what the engine multiplies, in the dtype of the computation; no kernel is timed here.
"""

from __future__ import annotations

import torch

from ..nvfp4 import E4M3_MAX


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
