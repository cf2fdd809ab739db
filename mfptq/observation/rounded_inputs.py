"""Say how engines round the inputs of a layer, by its weight's format.

Called by `quantized`. The arithmetic is in `nvfp4_inputs` and `fp8_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ..planning.formats import TargetFormat

if TYPE_CHECKING:
    import torch


def rounding(target: TargetFormat, scale: float | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what a format does to activations `[..., K]`; `scale` is what an output stores for them, None for nothing."""
    from .fp8_inputs import round_dynamic, round_static
    from .nvfp4_inputs import round_inputs

    if target.inputs is None:
        return _unchanged
    if scale is None:
        return partial(round_dynamic, width=target.inputs["group_size"] or 0)
    if target.family == "nvfp4":
        return partial(round_inputs, input_global_scale=scale)
    return partial(round_static, scale=scale)


def _unchanged(inputs: torch.Tensor) -> torch.Tensor:
    return inputs
