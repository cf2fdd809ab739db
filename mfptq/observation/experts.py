"""Recognize transformers' routed experts, held as 3-D stacks, and compute what reaches an expert's down_proj.

Called by `inputs`, `recording` and `substitution`. Experts that compute otherwise are refused, never guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.weights import STACKED_DOWN, STACKED_GATE_UP
from ..errors import ScaleError, quote

if TYPE_CHECKING:
    from torch import nn


def is_stack(module: nn.Module) -> bool:
    """Return whether a module holds a layer's experts as 3-D stacks."""
    stacks = [getattr(module, name, None) for name in (STACKED_GATE_UP, STACKED_DOWN)]
    return all(getattr(stack, "ndim", 0) == 3 for stack in stacks)


def check_stack(module: nn.Module, parent: str) -> None:
    """Refuse experts that do not compute down(act(gate(x)) * up(x)) from rows stored as [experts, out, in]."""
    unusual = [name for name in ("has_bias", "is_transposed") if getattr(module, name, False)]
    unusual += [f"no {name}" for name in ("has_gate", "is_concatenated") if not getattr(module, name, True)]
    if unusual or not (hasattr(module, "_apply_gate") or hasattr(module, "act_fn")):
        raise ScaleError(f"experts of {quote(parent)} are of an unknown kind ({', '.join(unusual)}): ignore them")


def gated(module: Any, expert: int, tokens: torch.Tensor) -> torch.Tensor:
    """Return what reaches an expert's `down_proj`."""
    both = torch.nn.functional.linear(tokens, module.gate_up_proj[expert])
    if hasattr(module, "_apply_gate"):
        gated: torch.Tensor = module._apply_gate(both)
        return gated
    gate, up = both.chunk(2, dim=-1)
    activated: torch.Tensor = module.act_fn(gate) * up
    return activated
