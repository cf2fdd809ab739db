"""Measure how much a model's last hidden state changes where the layers of one input alone are rounded to plain NVFP4.

Called by `calibration_pass` before it takes statistics. All variants of the model walk through the blocks in step: the exact one, and
one for each input whose layers were rounded in a block before. So every block's weights are needed once, also where the model
lies on disk, and what is kept is a hidden state for each variant and text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.weights import STACKED_DOWN, STACKED_GATE_UP
from ..errors import ScaleError, quote
from ..nvfp4 import BLOCK_SIZE, INPUT_SCALE_NUMERATOR
from .inputs import Inputs, ModelModules
from .rounded_inputs import round_nvfp4
from .runner import Runner, floats, swap_parameter
from .texts import TokenIds

if TYPE_CHECKING:
    from torch import nn

TEXTS, TOKENS = 4, 128  # as many texts as are read, and of each the first so many tokens
ROUNDED_AT_ONCE = 2**20  # weights: rounding takes several float32 copies of them


@dataclass(frozen=True, slots=True)
class Rounded:
    """Parameters that are rounded together: of all layers that share an input, or of a layer's routed experts."""

    name: str
    parameters: tuple[tuple[str, str], ...]  # module of the model, and the name of its parameter
    columns: Mapping[str, int]  # by the name of the parameter


def short_texts(samples: Sequence[TokenIds]) -> list[TokenIds]:
    """Return the beginnings of the first texts."""
    return [ids[:TOKENS] for ids in samples[:TEXTS]]


def variants(inputs: Inputs, model: nn.Module) -> list[Rounded]:
    """Return what is rounded together, in the order of the inputs; layers that the model does not build are left out."""
    modules = ModelModules(model)
    found = []
    for linear in inputs.linear:
        parameters = tuple((name, "weight") for name in map(modules.find, linear.info.modules) if name)
        found.append(Rounded(linear.info.name, parameters, {"weight": linear.info.columns}))
    for experts in inputs.experts:
        stacks = {STACKED_GATE_UP: experts.gate_up[0].columns, STACKED_DOWN: experts.down[0].columns}
        found.append(Rounded(experts.name, tuple((experts.module, name) for name in stacks), stacks))
    return found


def measure_sensitivities(runner: Runner, texts: Sequence[TokenIds], rounded: Sequence[Rounded]) -> dict[str, float]:
    """Return the squared relative error of the last hidden state for each variant, a mean over the tokens of some texts."""
    exact: list[Any] = [None] * len(texts)
    changed: dict[str, list[Any]] = {}  # by the variant's name, what the last block gave for each text

    def step(given: Sequence[Any]) -> list[Any]:
        return [runner.step(ids, before) for ids, before in zip(texts, given, strict=True)]

    for stage, block in enumerate(runner.blocks):
        own = [each for each in rounded if any(module.startswith(f"{block}.") for module, _ in each.parameters)]
        with runner.only(stage, block):
            changed = {name: step(given) for name, given in changed.items()}
            for each in own:
                with ExitStack() as stack:
                    _round(runner.model, each, stack)
                    changed[each.name] = step(exact)
            exact = step(exact)
    norm = final_norm(runner)
    states = [norm(next(floats(given))) for given in exact]
    return {name: _error(states, [norm(next(floats(each))) for each in given]) for name, given in changed.items()}


def _error(exact: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Return the mean over tokens of `|found - exact|^2 / |exact|^2`."""
    total = tokens = 0.0
    for a, b in zip(exact, found, strict=True):
        norms = a.float().square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        total += float(((b.float() - a.float()).square().sum(dim=-1) / norms).sum(dtype=torch.float64))
        tokens += norms.numel()
    return total / tokens


def final_norm(runner: Runner) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the norm between the last block and the output head, or what changes nothing where none stands beside the blocks.

    Large channels of the hidden state, which norms make small, would hide errors in the others.
    """
    beside = runner.blocks[-1].rpartition(".")[0].rpartition(".")[0]
    children = dict(runner.model.get_submodule(beside).named_children())
    found = [
        child for name, child in children.items() if name in ("norm", "final_layernorm", "final_layer_norm", "ln_f")
    ]
    if len(found) != 1:
        return lambda states: states

    def normed(states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = found[0](states)
        return result

    return normed


def _round(model: nn.Module, each: Rounded, stack: ExitStack) -> None:
    """Put rounded parameters in the place of the exact ones until the stack ends."""
    for module, name in each.parameters:
        home = model.get_submodule(module)
        swap_parameter(home, name, rounded_weight(getattr(home, name), each.columns[name], module), stack)


def rounded_weight(weight: torch.Tensor, columns: int, module: str = "") -> torch.Tensor:
    """Return a weight `[..., N, K]`, or `[K, N]` where a model holds it transposed, as plain NVFP4 holds it.

    Raises ScaleError where `columns`, K, is neither its last nor its first dimension, or no multiple of 16.
    """
    if columns % BLOCK_SIZE or columns not in (weight.shape[-1], weight.shape[0]):
        raise ScaleError(f"{quote(module)} holds a weight {list(weight.shape)}, expected {columns} columns: ignore it")
    if weight.shape[-1] != columns:
        return rounded_weight(weight.T.contiguous(), columns).T
    result = torch.empty_like(weight)
    rows, out = weight.detach().reshape(-1, columns), result.view(-1, columns)
    scale = INPUT_SCALE_NUMERATOR / max(float(weight.detach().abs().max()), torch.finfo(torch.float32).tiny)
    step = max(1, ROUNDED_AT_ONCE // columns)
    for start in range(0, len(rows), step):
        out[start : start + step] = round_nvfp4(rows[start : start + step], scale)
    return result
