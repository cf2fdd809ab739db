"""Take statistics of inputs by hooks while a model runs; never change what it computes.

Called by `calibration_pass`, which writes what a `Recorder` has found into the calibration file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..calibration.file import CalibrationContents, Description, InputInfo, InputStatistics, Int64Array, Level
from ..errors import ScaleError, counted, listed, quote
from .experts import gated
from .inputs import ExpertsInputs, Inputs, LinearInput
from .key_values import KeyValueRanges
from .sums import InputSums

if TYPE_CHECKING:
    from torch import nn

    from ..calibration.reading import Calibration


@dataclass(slots=True)
class Recorder:
    """The sums of every input, how many tokens each routed expert was given, and sensitivities that were measured."""

    inputs: Inputs
    level: Level
    key_values: KeyValueRanges
    sums: dict[str, InputSums] = field(init=False)
    routed: dict[str, Int64Array] = field(init=False)
    sensitivities: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sums = {info.name: InputSums(info.name, info.columns, self.level) for info in self.inputs.infos}
        self.routed = {each.name: np.zeros(len(each.down), np.int64) for each in self.inputs.experts}

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Watch the model inside the block."""
        hooks: list[tuple[str, Callable[..., None]]] = [
            *((linear.module, partial(self._take_linear, linear)) for linear in self.inputs.linear),
            *((experts.module, partial(self._take_experts, experts)) for experts in self.inputs.experts),
        ]
        with ExitStack() as stack:
            stack.enter_context(self.key_values.attached(model))
            for module, hook in hooks:
                registered = model.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(registered.remove)
            yield

    def restore(self, calibration: Calibration) -> bool:
        """Go on from what an unfinished file holds; return False, and take nothing, where that is of other inputs."""
        known, routed = {info.name: info for info in self.inputs.infos}, calibration.routed()
        same = all(known.get(name) == info for name, info in calibration.inputs.items())
        if not same or routed.keys() != self.routed.keys():
            return False
        for info in calibration.inputs.values():
            self.sums[info.name].restore(calibration.read(info))
        self.routed.update(routed)
        self.sensitivities.update(calibration.sensitivities)
        self.key_values.found.update(calibration.key_value_ranges())
        return True

    def contents(self, description: Description) -> CalibrationContents:
        """Return what a calibration file is to hold; `description` says how much text that is of."""
        seen = tuple(info for info in self.inputs.infos if self.sums[info.name].tokens)
        return CalibrationContents(
            description, seen, self._statistics, self.routed, self.sensitivities, self.key_values.found
        )

    def _statistics(self, info: InputInfo) -> InputStatistics:
        return self.sums[info.name].statistics()

    def check_reached(self) -> None:
        """Raise ScaleError if text does not reach an input at all, routed experts apart."""
        missed = [each.info.modules[0] for each in self.inputs.linear if not self.sums[each.info.name].tokens]
        if missed:
            raise ScaleError(
                f"{counted(len(missed), 'module takes', 'modules take')} no part in reading text: {listed(missed)}; ignore them"
            )

    def _take_linear(
        self, target: LinearInput, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        self.sums[target.info.name].add(inputs)

    def _take_experts(
        self, target: ExpertsInputs, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Take what experts are called with: tokens `[T, H]` and the numbers of their experts `[T, k]`."""
        called = [*args, *kwargs.values()]
        tokens, chosen = called[0].reshape(-1, called[0].shape[-1]), called[1]
        if chosen.is_floating_point() or chosen.numel() % len(tokens):
            raise ScaleError(f"experts of {quote(target.name)} are not called with the numbers of the chosen ones")
        chosen = chosen.reshape(len(tokens), -1)
        count, sums = len(target.down), self.sums
        routed = chosen.flatten()[chosen.flatten() < count].bincount(minlength=count)
        self.routed[target.name] += routed.cpu().numpy()
        shared = len(target.gate_up) < count
        if shared:
            sums[target.gate_up[0].name].add(tokens)
        for expert, down in enumerate(target.down):
            reached = tokens if shared else tokens[(chosen == expert).any(dim=1)]
            if not len(reached):
                continue
            if not shared:
                sums[target.gate_up[expert].name].add(reached)
            sums[down.name].add(gated(module, expert, reached))
