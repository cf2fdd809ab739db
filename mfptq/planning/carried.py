"""Take over weights that are NVFP4 in the source, with the scales that they and their fused partners share.

Called by `weight_targets`. Reads global and input scales, and never changes the codes of values. A scale of ModelOpt multiplies
and becomes 1/x. Partners with unequal scales take the smallest, and their block scales are rounded anew, which engines would
otherwise do silently, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.stored_bytes import read_scalar
from ..checkpoint.weights import StoredTensor, Weight
from ..encodings.fp4 import Nvfp4
from ..errors import SourceError, counted, quote
from ..names.engine import experts_parent
from ..names.fusion import FusedGroup
from ..nvfp4 import E4M3_MAX_CODE, E4M3_VALUES, e4m3_encode
from ..scales.experts import fill_experts, is_calibrated
from ..storage.digest import text_sha256
from .formats import GLOBAL_SCALE, INPUT_GLOBAL_SCALE, PACKED, SCALE
from .jobs import CopyTensor, Scalar

if TYPE_CHECKING:
    from ..checkpoint.source import Source
    from ..encodings.contents import Contents


UNCHANGED = bytes(range(256))


@dataclass(frozen=True, slots=True)
class CarriedWeight:
    """An NVFP4 weight of the source, with the scales that it will have; `table` maps the codes of its block scales."""

    encoding: Nvfp4
    global_scale: float
    input_scale: float | None
    table: bytes = UNCHANGED

    def copies(self, weight: Weight, at: Mapping[str, int]) -> Iterator[CopyTensor]:
        """Yield what is copied; `at` are the places of its output tensors, by suffix."""
        codes, scales = self.encoding.weight, self.encoding.scales
        yield CopyTensor(weight.module, codes.offset, at[PACKED], codes.info.nbytes, codes.shard)
        yield CopyTensor(weight.module, scales.offset, at[SCALE], scales.info.nbytes, scales.shard, self.table)

    def scalars(self, at: Mapping[str, int]) -> Iterator[Scalar]:
        """Yield the numbers that are written."""
        yield Scalar(at[GLOBAL_SCALE], self.global_scale)
        if self.input_scale is not None:
            yield Scalar(at[INPUT_GLOBAL_SCALE], self.input_scale)


@dataclass(frozen=True, slots=True)
class Carried:
    """All weights that go over, by module; `warnings` say what had to be repaired."""

    weights: Mapping[str, CarriedWeight]
    warnings: tuple[str, ...] = ()

    @property
    def digests(self) -> dict[str, str]:
        """What decides the bytes of what goes over, as a SHA-256, hexadecimal; nothing where there is none."""
        if not self.weights:
            return {}
        lines = [f"{name} {each.global_scale!r} {each.input_scale!r}" for name, each in self.weights.items()]
        return {"carried": text_sha256("\n".join(lines))}


def has_input_scales(contents: Contents) -> bool:
    """Return whether any weight that is NVFP4 has an input scale."""
    found = (tensor.encoding for tensor in contents if isinstance(tensor.encoding, Nvfp4))
    return any(encoding.input_scale is not None for encoding in found)


def carried_weights(
    source: Source, weights: Mapping[str, Nvfp4], groups: Sequence[FusedGroup], *, with_input: Collection[str]
) -> Carried:
    """Return NVFP4 weights, given by module, with their scales read and made equal in every group.

    `with_input` names the modules that keep their input scales. Raises SourceError for scales that are no positive numbers,
    and for a group that is NVFP4 in part.
    """
    found = {name: _read(source, encoding, with_input=name in with_input) for name, encoding in weights.items()}
    ratios: dict[str, float] = {}
    for group in groups if found else ():
        members = [member for member in group.members if member in found]
        if members and len(members) < len(group.members):
            other = next(member for member in group.members if member not in found)
            raise SourceError(
                f"fused group {quote(group.name)} is NVFP4 in part: {quote(members[0])} is, {quote(other)} is not: "
                f"convert the original checkpoint"
            )
        if members:
            ratios[group.name] = _equalize(found, members)
    return Carried(found, (*_warnings(ratios), *_filled(found, groups)))


def _read(source: Source, encoding: Nvfp4, *, with_input: bool) -> CarriedWeight:
    assert encoding.factor is not None
    divides, input_scale = encoding.divides, None
    if with_input and encoding.input_scale is not None:
        is_expert = experts_parent(encoding.weight.info.name.rpartition(".")[0]) is not None
        input_scale = _divisor(source, encoding.input_scale, divides=divides, unknown=is_expert)
    return CarriedWeight(encoding, _divisor(source, encoding.factor, divides=divides), input_scale)


def _divisor(source: Source, tensor: StoredTensor, *, divides: bool, unknown: bool = False) -> float:
    """Return a scale as the number that divides; with `unknown`, NaN for one that marks an expert without calibration."""
    value = read_scalar(source, tensor)
    if unknown and not is_calibrated(value):
        return math.nan
    if not math.isfinite(value) or value <= 0:
        raise SourceError(f"{quote(tensor.info.name)} in {quote(tensor.shard)} is {value}, expected a positive number")
    return value if divides else float(np.float32(1) / np.float32(value))


def _equalize(found: dict[str, CarriedWeight], members: Sequence[str]) -> float:
    """Give members the smallest scales of them all; return by how much their global scales differed."""
    scales = [found[member].global_scale for member in members]
    inputs = [found[member].input_scale for member in members]
    known = [value for value in inputs if value is not None and not math.isnan(value)]
    given = next((value for value in inputs if value is not None), None)
    least, least_input = min(scales), min(known, default=given)
    for member in members:
        own = found[member]
        table = UNCHANGED if own.global_scale == least else _rescaled(least / own.global_scale)
        found[member] = replace(own, global_scale=least, input_scale=least_input, table=table)
    return max(max(scales) / least, max(known) / min(known) if known else 1.0)


def _filled(found: dict[str, CarriedWeight], groups: Iterable[FusedGroup]) -> tuple[str, ...]:
    """Give experts that no calibration reached their layer's smallest input scale; return a line that says so."""
    inputs = {group: found[group.members[0]].input_scale for group in groups if group.members[0] in found}
    known = {group.name: value for group, value in inputs.items() if value is not None and not math.isnan(value)}
    routed = [group for group, value in inputs.items() if value is not None and experts_parent(group.name) is not None]
    experts = fill_experts("input scales of the source", routed, known)
    for group in routed if experts else ():
        for member in group.members:
            found[member] = replace(found[member], input_scale=known[group.name])
    if not experts:
        return ()
    words = "expert was never calibrated: it takes", "experts were never calibrated: they take"
    return (f"{counted(experts, *words)} the smallest input scale of the other experts of the layer",)


def _rescaled(ratio: float) -> bytes:
    """Return what each E4M3 code of a block scale becomes when its value is multiplied by a ratio up to 1."""
    codes = np.arange(256, dtype=np.uint8)
    values = E4M3_VALUES[: E4M3_MAX_CODE + 1] * np.float32(ratio)
    codes[: E4M3_MAX_CODE + 1] = e4m3_encode(values)
    return codes.tobytes()


def _warnings(ratios: Mapping[str, float]) -> tuple[str, ...]:
    unequal = {name: ratio for name, ratio in ratios.items() if ratio > 1}
    if not unequal:
        return ()
    worst = max(unequal, key=lambda name: unequal[name])
    return (
        f"{len(unequal)} fused groups of the source had unequal scales, by up to {unequal[worst]:.3g} times in "
        f"{quote(worst)}: they are repaired, for engines take one scale for all members",
    )
