"""Pair what an output holds with what it was made from: weights with their tensors, kept tensors with their copies.

Called by `verification`. Reads headers and scalars, no weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..checkpoint.companions import SMOOTHING
from ..checkpoint.folder import Checkpoint
from ..checkpoint.source import Source
from ..checkpoint.stored_bytes import read_scalar
from ..checkpoint.weights import StoredTensor, Weight, candidates
from ..encodings.contents import Contents, read_contents
from ..encodings.fp4 import Nvfp4
from ..encodings.smoothed import smoothed
from ..names.config_sizes import read_sizes
from ..names.structure import Structure
from ..output.fault import Fault
from ..output.stored_formats import ConfigGroup, config_of, group_of, quantized_modules, read_groups
from ..planning.formats import GLOBAL_SCALE, PACKED, SCALE, TargetFormat
from ..smoothing.record import read_record
from ..smoothing.structure import find_links
from ..smoothing.sums import unbalanced
from .stored_weights import KeptPart, Part, StoredWeight, kept_parts


def pair(
    output: Checkpoint, original: Checkpoint, stored: dict[str, StoredTensor], faults: list[Fault]
) -> Iterator[Part]:
    """Yield all that is to be compared, and take it out of `stored`; what cannot be is added to `faults`."""
    quantized = frozenset(quantized_modules(stored))
    try:
        groups = read_groups(config_of(output))
    except ValueError:
        groups = []
    for item in candidates(_smoothed(output.source, original, faults), read_sizes(original.config)):
        tensor = item.tensor
        name = tensor.info.name
        if item.weights and all(weight.module in quantized for weight in item.weights):
            for weight in item.weights:
                taken = _take(weight, groups, stored)
                if taken is not None:
                    made = StoredWeight(weight, *taken, output.source)
                    yield from made.split()
                    yield from _carried(made, original)
        elif (kept := stored.pop(name, None)) is None:
            faults.append(Fault(name, "", "is in the source, but missing here"))
        elif (tensor.info.dtype, tensor.info.shape) != (kept.info.dtype, kept.info.shape):
            faults.append(Fault(name, kept.shard, "has another dtype or shape than in the source"))
        else:
            yield from kept_parts(tensor, kept, output.source)


def _smoothed(output: Source, original: Checkpoint, faults: list[Fault]) -> Contents:
    """Return the source's tensors as a conversion read them: times the factors that the output says it has, which must cancel."""
    contents, powers = read_contents(original), read_record(output)
    if not powers:
        return contents
    tensors = {each.info.name: each for each in contents}
    structure = Structure([(name, each.info.shape) for name, each in tensors.items()], original.config)
    read = contents.mapped(lambda tensor: smoothed(tensor, powers))
    wrong = unbalanced(find_links(tensors, original.config, structure.outside).links, tensors, powers)
    faults += [Fault(name, SMOOTHING, "has factors that change what the model computes") for name in wrong]
    return read


def _take(
    weight: Weight, groups: Sequence[ConfigGroup], stored: dict[str, StoredTensor]
) -> tuple[TargetFormat, Mapping[str, StoredTensor]] | None:
    """Take a weight's tensors out of those that are left; None, with a fault already found, where some are missing."""
    group = group_of(weight.module, groups)
    if group is None:
        return None
    names = {each.suffix: f"{weight.module}.{each.suffix}" for each in group.format.tensors(weight, "search")}
    parts = {suffix: stored.pop(name) for suffix, name in names.items() if name in stored}
    return (group.format, parts) if parts.keys() == names.keys() else None


def _carried(made: StoredWeight, original: Checkpoint) -> Iterator[KeptPart]:
    """Yield the codes of a weight that was NVFP4 already, and its block scales where its global scale is the same too."""
    encoding = made.weight.encoding
    if not isinstance(encoding, Nvfp4) or encoding.factor is None or GLOBAL_SCALE not in made.parts:
        return
    yield from kept_parts(encoding.weight, made.parts[PACKED], made.source)
    factor = np.float32(read_scalar(original.source, encoding.factor))
    same = factor if encoding.divides else 1 / factor
    if same == np.float32(read_scalar(made.source, made.parts[GLOBAL_SCALE])):
        yield from kept_parts(encoding.scales, made.parts[SCALE], made.source)
