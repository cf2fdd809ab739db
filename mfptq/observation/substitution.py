"""Give modules of a transformers model the weights, and the rounded inputs, of a quantized output, for a while.

Called by `side_by_side`. Inside `lent` the model computes what an engine computes with the output; afterwards it is itself again.
Nothing here changes a module that holds no quantized weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ..checkpoint.weights import STACKED_DOWN, STACKED_GATE_UP, StoredTensor
from ..errors import SourceError, quote
from ..names.engine import experts_parent
from .experts import check_stack, gated
from .inputs import ModelModules
from .runner import swap_parameter

if TYPE_CHECKING:
    from torch import nn

    from .quantized import QuantizedCheckpoint, QuantizedWeight

PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
Expert: TypeAlias = "dict[str, QuantizedWeight]"  # the parts of one that are quantized, by PARTS
Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class Substitution:
    """Quantized weights by the module that holds them in the model; `left_out` are those that it does not build.

    `scaled` are kept tensors that smoothing has changed, by the module and by the name of its parameter.
    """

    output: QuantizedCheckpoint
    scaled: dict[tuple[str, str], StoredTensor] = field(default_factory=dict)
    linear: dict[str, QuantizedWeight] = field(default_factory=dict)
    stacks: dict[str, dict[int, Expert]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def keep_only(self, parents: Sequence[str]) -> None:
        """Leave out what lies in none of these modules: text does not go through it."""

        def outside(name: str) -> bool:
            return not any(_lies_in(name, parent) for parent in parents)

        for name in filter(outside, list(self.linear)):
            self.left_out.append(self.linear.pop(name).module)
        for name in filter(outside, list(self.stacks)):
            self.left_out += [part.module for parts in self.stacks.pop(name).values() for part in parts.values()]

    @contextmanager
    def lent(self, model: nn.Module, parent: str) -> Iterator[None]:
        """Put the output's weights into `parent`, and its inputs' rounding before them, inside the block."""
        with ExitStack() as stack:
            for name, weight in self.linear.items():
                if _lies_in(name, parent):
                    self._lend_linear(model.get_submodule(name), weight, stack)
            for name, experts in self.stacks.items():
                if _lies_in(name, parent):
                    self._lend_stack(model.get_submodule(name), experts, stack)
            for (name, leaf), tensor in self.scaled.items():
                if _lies_in(name, parent):
                    self._lend_tensor(model.get_submodule(name), leaf, tensor, stack)
            yield

    def _lend_tensor(self, module: Any, leaf: str, tensor: StoredTensor, stack: ExitStack) -> None:
        values = torch.empty_like(getattr(module, leaf))
        values.copy_(self.output.values(tensor))
        swap_parameter(module, leaf, values, stack)

    def _lend_linear(self, module: Any, weight: QuantizedWeight, stack: ExitStack) -> None:
        values = torch.empty_like(module.weight)
        self.output.decode(weight, values)
        swap_parameter(module, "weight", values, stack)
        if weight.rounds_inputs:
            hook = partial(_round_first, weight.round_inputs)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _lend_stack(self, module: Any, experts: Mapping[int, Expert], stack: ExitStack) -> None:
        gate_up, down = module.gate_up_proj.detach().clone(), module.down_proj.detach().clone()
        half = gate_up.shape[1] // 2
        for number, parts in experts.items():
            places = {"gate": gate_up[number, :half], "up": gate_up[number, half:], "down": down[number]}
            for part, weight in parts.items():
                self.output.decode(weight, places[part])
        swap_parameter(module, STACKED_GATE_UP, gate_up, stack)
        swap_parameter(module, STACKED_DOWN, down, stack)
        if any(weight.rounds_inputs for parts in experts.values() for weight in parts.values()):
            original = module.forward
            module.forward = _RoundedExperts(module, experts)
            stack.callback(setattr, module, "forward", original)


def find_substitution(model: nn.Module, output: QuantizedCheckpoint) -> Substitution:
    """Return where a model, as transformers builds it, holds the quantized weights of an output.

    Raises SourceError where two weights claim one module, or experts are of a kind that is not known.
    """
    modules = ModelModules(model)
    unbuilt = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    found = Substitution(output)
    for module, weight in output.weights.items():
        parent = experts_parent(module)
        home, name = modules.experts(parent) if parent else "", modules.find(module)
        if any(re.search(pattern, module) for pattern in unbuilt) or not (home or name):
            found.left_out.append(module)
        elif home:
            check_stack(modules.by_name[home], home)
            number, part = _expert_part(module)
            found.stacks.setdefault(home, {}).setdefault(number, {})[part] = weight
        elif name in found.linear:
            raise SourceError(
                f"{quote(module)} and {quote(found.linear[name].module)} are both the model's {quote(name)}"
            )
        else:
            _check_shape(modules.by_name[name], name, weight)
            found.linear[name] = weight
    for tensor in output.scaled.values():
        found.scaled[_holder(tensor, modules)] = tensor
    return found


def _holder(tensor: StoredTensor, modules: ModelModules) -> tuple[str, str]:
    """Return the module of a model that holds a tensor, and under which name; raises SourceError if there is none."""
    parent, _, leaf = tensor.info.name.rpartition(".")
    name = modules.find(parent)
    shape = tuple(getattr(getattr(modules.by_name.get(name), leaf, None), "shape", ()))
    if shape != tensor.info.shape:
        raise SourceError(
            f"{quote(tensor.info.name)} is scaled in the output, and the model does not hold it as a tensor of "
            f"{list(tensor.info.shape)}: such a model cannot be evaluated"
        )
    return name, leaf


def _expert_part(module: str) -> tuple[int, str]:
    """Return which expert a projection belongs to, and which part of it it is."""
    *_, number, leaf = module.split(".")
    if leaf not in PARTS:
        raise SourceError(f"{quote(module)} is no projection of an expert that is known: {', '.join(PARTS)}")
    return int(number), PARTS[leaf]


def _check_shape(module: Any, name: str, weight: QuantizedWeight) -> None:
    """Refuse a module that does not hold the matrix as the output does, such as one that holds it transposed."""
    shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))
    if shape != (weight.rows, weight.columns):
        raise SourceError(
            f"{quote(weight.module)} is {weight.rows} x {weight.columns} in the output, {quote(name)} of the model has "
            f"{list(shape)}: such a model cannot be evaluated"
        )


def _lies_in(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _round_first(
    rounded: Rounding, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (rounded(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: rounded(kwargs[first])}


@dataclass(frozen=True, slots=True)
class _RoundedExperts:
    """The forward pass of a layer's experts with their inputs rounded; as transformers' own loop, in the experts' order."""

    module: Any
    experts: Mapping[int, Expert]

    def __call__(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return what the experts give for tokens `[T, H]` sent to `chosen` `[T, k]` with `weights` `[T, k]`."""
        result = torch.zeros_like(hidden)
        for number in range(self.module.gate_up_proj.shape[0]):
            tokens, places = torch.where(chosen == number)
            if not len(tokens):
                continue
            parts = self.experts.get(number, {})
            inner = gated(self.module, number, _rounded(hidden[tokens], parts.get("gate")))
            given = torch.nn.functional.linear(_rounded(inner, parts.get("down")), self.module.down_proj[number])
            given = given * weights[tokens, places, None]
            result.index_add_(0, tokens, given.to(result.dtype))
        return result


def _rounded(inputs: torch.Tensor, weight: QuantizedWeight | None) -> torch.Tensor:
    return inputs if weight is None else weight.round_inputs(inputs)
