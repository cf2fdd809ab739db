"""Take statistics of inputs by hooks while a model runs; never change what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..calibration.file import InputInfo, InputStatistics, Int64Array, Level
from ..errors import ScaleError, counted, listed, quote
from .inputs import ExpertsInputs, Inputs, LinearInput
from .key_values import KeyValueRanges
from .sums import InputSums

if TYPE_CHECKING:
    from torch import nn


@dataclass(slots=True)
class Recorder:
    """The sums of every input, how many tokens each routed expert was given, and sensitivities that were measured."""

    inputs: Inputs
    level: Level
    sums: dict[str, InputSums] = field(init=False)
    routed: dict[str, Int64Array] = field(init=False)
    sensitivities: dict[str, float] = field(default_factory=dict)
    key_values: KeyValueRanges = field(default_factory=lambda: KeyValueRanges(()))

    def __post_init__(self) -> None:
        self.sums = {info.name: InputSums(info.name, info.columns, self.level) for info in self.inputs.infos}
        self.routed = {each.name: np.zeros(len(each.down), np.int64) for each in self.inputs.experts}

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Watch the model inside the block."""
        with ExitStack() as stack:
            stack.enter_context(self.key_values.attached(model))
            for linear in self.inputs.linear:
                hook = _LinearHook(self, linear)
                module = model.get_submodule(linear.module)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for experts in self.inputs.experts:
                module = model.get_submodule(experts.module)
                stack.callback(module.register_forward_pre_hook(_ExpertsHook(self, experts), with_kwargs=True).remove)
            yield

    def seen(self) -> tuple[InputInfo, ...]:
        """Return the inputs that any token reached."""
        return tuple(info for info in self.inputs.infos if self.sums[info.name].tokens)

    def statistics(self, info: InputInfo) -> InputStatistics:
        """Return what is known of an input."""
        return self.sums[info.name].statistics()

    def check_reached(self) -> None:
        """Raise ScaleError if text does not reach an input at all, routed experts apart."""
        missed = [each.info.modules[0] for each in self.inputs.linear if not self.sums[each.info.name].tokens]
        if missed:
            raise ScaleError(
                f"{counted(len(missed), 'module takes', 'modules take')} no part in reading text: {listed(missed)}; ignore them"
            )


@dataclass(frozen=True, slots=True)
class _LinearHook:
    recorder: Recorder
    target: LinearInput

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        self.recorder.sums[self.target.info.name].add(inputs)


@dataclass(frozen=True, slots=True)
class _ExpertsHook:
    """Takes what experts are called with: tokens `[T, H]` and the numbers of their experts `[T, k]`."""

    recorder: Recorder
    target: ExpertsInputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called = [*args, *kwargs.values()]
        tokens, chosen = called[0].reshape(-1, called[0].shape[-1]), called[1]
        if chosen.is_floating_point() or chosen.numel() % len(tokens):
            raise ScaleError(f"experts of {quote(self.target.name)} are not called with the numbers of the chosen ones")
        chosen = chosen.reshape(len(tokens), -1)
        count, sums = len(self.target.down), self.recorder.sums
        routed = chosen.flatten()[chosen.flatten() < count].bincount(minlength=count)
        self.recorder.routed[self.target.name] += routed.cpu().numpy()
        shared = len(self.target.gate_up) < count
        if shared:
            sums[self.target.gate_up[0].name].add(tokens)
        for expert, down in enumerate(self.target.down):
            reached = tokens if shared else tokens[(chosen == expert).any(dim=1)]
            if not len(reached):
                continue
            if not shared:
                sums[self.target.gate_up[expert].name].add(reached)
            sums[down.name].add(gated(module, expert, reached))


def gated(module: Any, expert: int, tokens: torch.Tensor) -> torch.Tensor:
    """Return what reaches an expert's `down_proj`."""
    from torch.nn.functional import linear

    both = linear(tokens, module.gate_up_proj[expert])
    if hasattr(module, "_apply_gate"):
        gated: torch.Tensor = module._apply_gate(both)
        return gated
    gate, up = both.chunk(2, dim=-1)
    activated: torch.Tensor = module.act_fn(gate) * up
    return activated


def swap_parameter(module: Any, name: str, values: torch.Tensor, stack: ExitStack) -> None:
    """Give a module other values for one of its parameters until the stack ends."""
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
