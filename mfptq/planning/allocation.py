"""Choose a format for each unit, so that the predicted error of the model's output is least at a size in bytes.

Called by `execution.size_target`, which finds sizes and errors. Pure and deterministic: the same numbers give the same choice.

Errors of units add up, since rounding errors of different layers are independent of each other. So the best choice goes along
the concave frontier of each unit: of all steps to a larger format, those that remove the most error for a byte come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ..errors import UsageError
from ..sizes import size_text

NORM, REFERENCE = "norm", "reference"  # beside formats among the errors of a layer: its weights' norm, plain NVFP4


class Option(NamedTuple):
    """A format that a unit may have: its size in bytes, and the predicted squared error of the model's output."""

    format: str
    nbytes: int
    error: float


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that share a format: a fused layer, or all routed experts of a layer.

    `modules` are the source's, `elements` their weights; `options` begins with the format that it has without a target.
    """

    name: str
    modules: tuple[str, ...]
    elements: int
    options: tuple[Option, ...]


Choice = Mapping[str, Option]  # by unit


class Step(NamedTuple):
    """A way to spend bytes on a unit: from the option before on its frontier to `option`."""

    unit: str
    before: Option
    option: Option

    @property
    def nbytes(self) -> int:
        """The bytes that it costs."""
        return self.option.nbytes - self.before.nbytes

    @property
    def gain(self) -> float:
        """The error that it removes for a byte."""
        return (self.before.error - self.option.error) / self.nbytes


def frontier(unit: Unit) -> list[Option]:
    """Return the options worth having, by size: each removes more error for a byte than the next one does.

    It begins with the unit's first option, or with a smaller one that is better.
    """
    found: list[Option] = []
    for option in sorted(unit.options, key=lambda each: (each.nbytes, each.error)):
        if found and option.error >= found[-1].error:
            continue
        while len(found) > 1 and Step("", found[-1], option).gain >= Step("", found[-2], found[-1]).gain:
            found.pop()
        found.append(option)
    return found


def allocate(units: Sequence[Unit], budget: int) -> dict[str, Option]:
    """Return each unit's option, all of them at most `budget` bytes together.

    Raises UsageError where even the smallest options take more.
    """
    chosen = {unit.name: frontier(unit)[0] for unit in units}
    left = budget - sum(option.nbytes for option in chosen.values())
    if left < 0:
        raise UsageError(
            f"the target leaves {size_text(max(budget, 0))} for the layers that may be made smaller, "
            f"which take {size_text(budget - left, up=True)} at least: give a larger one"
        )
    steps = [step for unit in units for step in _steps(unit)]
    steps.sort(key=lambda each: (-each.gain, each.unit))
    return _exchanged(_filled(chosen, steps, left), steps, budget)


def _steps(unit: Unit, last: Option | None = None) -> list[Step]:
    """Return the steps of a unit along its frontier, up to an option."""
    options = frontier(unit)
    end = len(options) if last is None else options.index(last) + 1
    return [Step(unit.name, before, option) for before, option in pairwise(options[:end])]


def _filled(chosen: Choice, steps: Iterable[Step], left: int, without: str = "") -> dict[str, Option]:
    """Return a choice with every step taken that fits into the bytes left, in order; none of the unit `without`."""
    found = dict(chosen)
    for step in steps:
        if step.nbytes <= left and found[step.unit] is step.before and step.unit != without:
            found[step.unit] = step.option
            left -= step.nbytes
    return found


def _exchanged(chosen: dict[str, Option], steps: Sequence[Step], budget: int) -> dict[str, Option]:
    """Return a choice with steps taken back, the least useful first, where others use their bytes better.

    Large units leave gaps that only a few small ones fit into; the concave frontier alone does not see that.
    """
    for step in reversed(steps):
        if chosen[step.unit] is not step.option:
            continue
        back = {**chosen, step.unit: step.before}
        other = _filled(back, steps, budget - sum(option.nbytes for option in back.values()), without=step.unit)
        if _total(other) < _total(chosen):
            chosen = other
    return chosen


def _total(chosen: Choice) -> float:
    return math.fsum(option.error for option in chosen.values())


class FrontierRow(NamedTuple):
    """What a size would give: bits for each weight, bytes of the whole output, predicted error relative to no target's.

    `formats` has how many weights, in elements, each format would get.
    """

    bits: float
    nbytes: int
    error: float
    formats: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Allocation:
    """A choice for a target. `basis` says what the errors are predicted from; `fixed` is the size, in bytes, of the quantized
    layers that no target may change, of `fixed_elements` weights; `others` that of everything else in the output's files.
    """

    target: str
    basis: str
    units: tuple[Unit, ...]
    chosen: Mapping[str, Option]
    fixed: int
    fixed_elements: int
    others: int

    @property
    def elements(self) -> int:
        """The weights that bits are counted over: all that are quantized without a target."""
        return self.fixed_elements + sum(unit.elements for unit in self.units)

    @property
    def size(self) -> int:
        """The bytes of the units as they were chosen."""
        return sum(option.nbytes for option in self.chosen.values())

    @property
    def row(self) -> FrontierRow:
        """What was chosen."""
        return self._row(self.chosen)

    @property
    def smallest(self) -> FrontierRow:
        """What no target would give."""
        return self._row({unit.name: unit.options[0] for unit in self.units})

    @property
    def least_gain(self) -> float:
        """The error for a byte that the least useful of the steps removes which were taken; 0 where none was."""
        taken = [step.gain for unit in self.units for step in _steps(unit, self.chosen[unit.name])]
        return min(taken, default=0.0)

    def next_step(self, name: str) -> Step | None:
        """Return the next step of a unit along its frontier; None where it has the best option."""
        unit = next(each for each in self.units if each.name == name)
        options = [option for option in frontier(unit) if option.nbytes > self.chosen[name].nbytes]
        return Step(name, self.chosen[name], options[0]) if options else None

    @property
    def base_error(self) -> float:
        """The predicted error where every unit keeps its first option."""
        return sum(unit.options[0].error for unit in self.units)

    def frontier(self, bits: Iterable[float]) -> Iterator[FrontierRow]:
        """Yield what other targets, in bits for each weight, would give; those that are too small are left out."""
        for each in bits:
            try:
                found = allocate(self.units, int(each * self.elements / 8) - self.fixed)
            except UsageError:
                continue
            yield self._row(found)

    def _row(self, chosen: Mapping[str, Option]) -> FrontierRow:
        formats: dict[str, int] = {}
        for unit in self.units:
            name = chosen[unit.name].format
            formats[name] = formats.get(name, 0) + unit.elements
        size = self.fixed + sum(option.nbytes for option in chosen.values())
        error = sum(option.error for option in chosen.values())
        return FrontierRow(size * 8 / self.elements, size + self.others, error / (self.base_error or 1.0), formats)
