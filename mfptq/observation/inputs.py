"""Find which modules of a transformers model meet which input, by the names that the checkpoint gives its weights.

Linear layers that share an input, as q/k/v, are one input. Routed experts are fused 3-D in transformers; the checkpoint's
logical weights (`...mlp.experts.3.gate_proj`) name their inputs. Where every expert sees every token, gate and up of a
whole layer's experts share one input; what reaches `down_proj` differs from expert to expert.

Called by `calibration_pass`; `ModelModules` by whatever looks for the checkpoint's modules in a model. The model is never run here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..calibration.file import InputInfo
from ..checkpoint.weights import STACKED_DOWN, STACKED_GATE_UP
from ..errors import ScaleError, counted, listed, quote
from ..names.engine import experts_parent
from .experts import check_stack, is_stack

if TYPE_CHECKING:
    from torch import nn

    from ..planning.plan import ConversionPlan

_NUMBERED = re.compile(r"[^.]+\.\d+(\.|$)")


@dataclass(frozen=True, slots=True)
class LinearInput:
    """An input that linear layers share: `module` is the first of them, as the transformers model names it."""

    module: str
    info: InputInfo


@dataclass(frozen=True, slots=True)
class ExpertsInputs:
    """The inputs of a layer's routed experts: `name` is the checkpoint's, `module` the transformers model's.

    `gate_up` has one input that all share, or one for each expert; `down` one for each expert, in their order.
    """

    module: str
    name: str
    gate_up: tuple[InputInfo, ...]
    down: tuple[InputInfo, ...]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Every input of which statistics are taken."""

    linear: tuple[LinearInput, ...]
    experts: tuple[ExpertsInputs, ...]

    @property
    def infos(self) -> tuple[InputInfo, ...]:
        """All of them, sorted by name."""
        infos = [each.info for each in self.linear]
        infos += [info for each in self.experts for info in (*each.gate_up, *each.down)]
        return tuple(sorted(infos, key=lambda info: info.name))

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules to watch, as the transformers model names them."""
        return (*(each.module for each in self.linear), *(each.module for each in self.experts))


def find_inputs(plan: ConversionPlan, model: nn.Module, *, all_experts: bool) -> Inputs:
    """Return the inputs of everything that the plan quantizes, found in the model as transformers builds it.

    Raises ScaleError, naming them, for modules that the model does not have.
    """
    columns = {weight.module: weight.columns for weight in plan.weights()}
    groups = [InputInfo(group.name, columns[group.members[0]], group.members) for group in plan.selection.groups]
    modules = ModelModules(model)
    linear: list[LinearInput] = []
    experts: dict[tuple[str, str], list[InputInfo]] = {}
    lost: list[str] = []
    for info in groups:
        first = info.modules[0]
        parent = experts_parent(first)
        if parent and (home := modules.experts(parent)):
            experts.setdefault((home, parent), []).append(info)
        elif name := modules.find(first):
            linear.append(LinearInput(name, info))
        else:
            lost.append(first)
    if lost:
        what = counted(len(lost), "module is", "modules are")
        raise ScaleError(f"{what} not in the model as transformers builds it: {listed(lost)}; ignore them")
    stacks = (
        _experts(modules.by_name[home], (home, parent), infos, all_experts=all_experts)
        for (home, parent), infos in experts.items()
    )
    return Inputs(tuple(linear), tuple(stacks))


class ModelModules:
    """The modules of a transformers model, found by the names that the checkpoint gives them."""

    def __init__(self, model: nn.Module) -> None:
        self.by_name = dict(model.named_modules())
        self._names = Names(self.by_name)
        self._stacks = Names(name for name, module in self.by_name.items() if is_stack(module))

    def find(self, name: str) -> str:
        """Return the model's name for a checkpoint's module, or "" if it has none."""
        return self._names.find(name)

    def experts(self, parent: str) -> str:
        """Return the model's name for the stacks that hold a layer's experts, or "" if it has none."""
        return self._stacks.find(parent) or self._stacks.find_layer(parent)


class Names:
    """Names of a transformers model's modules, found by those that the checkpoint gives them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_tail: dict[str, list[str]] = {}
        self._by_layer: dict[str, list[str]] = {}
        for name in names:
            self._by_tail.setdefault(_tail(name), []).append(name)
            self._by_layer.setdefault(_layer(name), []).append(name)

    def find(self, name: str) -> str:
        """Return the model's name for a checkpoint's module, or "" if it has none.

        Prefixes differ (`model.language_model.layers.0...`, `model.layers.0...`): what counts is the name from the first
        numbered part on; of several such, the one that shares the most of the prefix.
        """
        tail = _tail(name)
        found = self._by_tail.get(tail, [])
        if name in found:
            return name
        parts = set(name.removesuffix(tail).split("."))
        shared = {other: len(parts & set(other.removesuffix(tail).split("."))) for other in found if tail}
        best = [other for other in shared if shared[other] == max(shared.values())]
        return best[0] if len(best) == 1 else ""

    def find_layer(self, name: str) -> str:
        """Return the one module of the same layer, whatever its name (`block_sparse_moe`, `mlp`), or ""."""
        found = self._by_layer.get(_layer(name), [])
        return found[0] if len(found) == 1 else ""


def _tail(name: str) -> str:
    found = _NUMBERED.search(name)
    return name[found.start() :] if found else ""


def _layer(name: str) -> str:
    found = _NUMBERED.search(name)
    return found.group().rstrip(".") if found else ""


def _experts(
    module: nn.Module, names: tuple[str, str], infos: Sequence[InputInfo], *, all_experts: bool
) -> ExpertsInputs:
    home, parent = names
    check_stack(module, parent)
    by_number = sorted(infos, key=lambda info: int(info.modules[0].removeprefix(parent).split(".")[1]))
    gate_up = tuple(info for info in by_number if len(info.modules) > 1)
    down = tuple(info for info in by_number if len(info.modules) == 1)
    count = module.get_parameter(STACKED_DOWN).shape[0]
    if len(gate_up) != count or len(down) != count:
        raise ScaleError(f"{quote(parent)} has {len(gate_up)} and {len(down)} inputs for {count} experts: ignore it")
    if all_experts:
        every = tuple(member for info in gate_up for member in info.modules)
        gate_up = (InputInfo(f"{parent}.{STACKED_GATE_UP}", gate_up[0].columns, every),)
    return ExpertsInputs(home, parent, gate_up, down)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The repeated blocks around the inputs, in the model's order, and the modules to watch `outside` of them."""

    names: tuple[str, ...]
    outside: tuple[str, ...]

    def check_streamable(self) -> None:
        """Raise ScaleError where an input would not be met: streaming runs the blocks, and nothing behind them."""
        if self.outside:
            raise ScaleError(
                f"{quote(self.outside[0])} lies outside of the repeated blocks that are streamed: raise max_memory "
                "to hold the model, or ignore it"
            )


def find_blocks(model: nn.Module, inputs: Inputs) -> Blocks:
    """Return the repeated blocks of the model: all of each list that has an input."""
    from torch import nn

    modules = dict(model.named_modules())
    lists: dict[str, None] = {}
    outside: list[str] = []
    for name in inputs.modules:
        parts = name.split(".")
        parents = (".".join(parts[:end]) for end in range(1, len(parts)))
        outermost = next((parent for parent in parents if isinstance(modules[parent], nn.ModuleList)), None)
        if outermost is None:
            outside.append(name)
        else:
            lists[outermost] = None
    names = tuple(f"{parent}.{number}" for parent in lists for number, _ in modules[parent].named_children())
    return Blocks(names, tuple(outside))
