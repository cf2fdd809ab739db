"""Check what an output's files say of each other: shapes, dtypes, config, fused scales, index.

Called by `verification`. Reads headers and scalars, never weights; what is wrong is yielded, not raised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..checkpoint.companions import CONFIG, INDEX
from ..checkpoint.folder import Checkpoint
from ..checkpoint.small_files import read_object
from ..checkpoint.source import Source
from ..checkpoint.stored_bytes import read_scalar
from ..checkpoint.weights import StoredTensor, Weight
from ..errors import listed, quote
from ..limits import MAX_INDEX_BYTES
from ..names import REGEX_PREFIX
from ..names.engine import built_modules, experts_module
from ..names.fusion import fused_groups, parameters
from ..planning.defaults import siblings_of
from ..planning.formats import QUANTIZATION_CONFIG, SCALAR, TargetFormat
from ..planning.quantization_config import head_targets
from .acceptance import refusal
from .fault import Fault
from .stored_formats import (
    ConfigGroup,
    cache_scales,
    config_of,
    group_of,
    quantized_modules,
    read_groups,
    tensor_faults,
)

_ANY = Weight("", "", "BF16", 0, 16, 16)  # of which only the names of its tensors are asked


def structure_faults(checkpoint: Checkpoint) -> Iterator[Fault]:
    """Yield what is wrong with an output by itself, its weights and digests apart."""
    for shard in checkpoint.shards:
        if problem := refusal(checkpoint.origin.local / shard.name, len(shard.header.tensors)):
            yield Fault("", shard.name, problem)
    stored = {tensor.info.name: tensor for tensor in checkpoint.tensors()}
    modules, config = quantized_modules(stored), config_of(checkpoint)
    try:
        groups = read_groups(config)
    except ValueError as error:
        yield Fault("", CONFIG, f"{error}: it has no {QUANTIZATION_CONFIG} that mfptq writes")
        return
    formats = {module: group.format for module in modules if (group := group_of(module, groups)) is not None}
    quantized = frozenset(modules)
    linear = [
        module
        for name, tensor in stored.items()
        for module in _first_built(name, tensor.info.shape)
        if module not in quantized
    ]
    found = [Fault(name, "", "is quantized, but no config group is for it") for name in modules if name not in formats]
    for module, target in formats.items():
        found += [Fault(name, "", what) for name, what in tensor_faults(module, target, stored)]
    found += _ignore_faults(config.get("ignore"), modules, linear)
    found += _head_faults(groups, modules)
    found += _cache_faults(checkpoint.source, cache_scales(stored, config))
    yield from found or _fusion_faults(checkpoint.source, stored, formats, linear)
    if checkpoint.has_index:
        metadata = read_object(checkpoint.source, INDEX, MAX_INDEX_BYTES).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total != checkpoint.tensor_bytes:
            yield Fault("", INDEX, f"says total_size {total}, the tensors have {checkpoint.tensor_bytes}")


def _cache_faults(source: Source, scales: Mapping[str, StoredTensor]) -> Iterator[Fault]:
    for name, tensor in scales.items():
        if (tensor.info.dtype, tensor.info.shape) != ("F32", (1,)):
            yield Fault(name, tensor.shard, f"is {tensor.info.dtype} {list(tensor.info.shape)}, expected F32 [1]")
        elif not 0 < (value := read_scalar(source, tensor)) < math.inf:
            yield Fault(name, tensor.shard, f"is {value}, expected a positive number")


def _ignore_faults(ignore: object, modules: Iterable[str], linear: Iterable[str]) -> Iterator[Fault]:
    entries = [entry for entry in ignore if isinstance(entry, str)] if isinstance(ignore, list) else []
    names = set(entries)
    try:
        regexes = [re.compile(e.removeprefix(REGEX_PREFIX)) for e in entries if e.startswith(REGEX_PREFIX)]
    except re.error as error:
        yield Fault("", CONFIG, f"has an ignore pattern that is not a regex: {error}")
        return
    for module in modules:
        if module in names or any(regex.match(module) for regex in regexes):
            yield Fault(module, "", "is quantized, but config.json ignores it")
    for module in linear:
        if module not in names and not any(regex.match(module) for regex in regexes):
            yield Fault(module, "", "is not quantized, but config.json does not ignore it")


def _head_faults(groups: Sequence[ConfigGroup], modules: Iterable[str]) -> Iterator[Fault]:
    heads = {pattern: module for module in modules for pattern in head_targets([module])}
    for pattern, module in heads.items():
        if not any(regex.match(module) for group in groups for regex in group.regexes):
            yield Fault("", CONFIG, f"lacks the target {quote(pattern)}, without which engines find no quantized head")


def _first_built(name: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Yield the layers that engines build for a kept matrix, or for the first of kept experts, which decides for all."""
    if len(shape) == 2 or (len(shape) == 3 and experts_module(name, shape)):
        yield from built_modules(name, (1, *shape[1:]) if len(shape) == 3 else shape)


def _fusion_faults(
    source: Source, stored: Mapping[str, StoredTensor], formats: Mapping[str, TargetFormat], linear: Iterable[str]
) -> Iterator[Fault]:
    for group in parameters([*formats, *linear], siblings_of([*stored, *formats])):
        inside = [member for member in group.members if member in formats]
        if inside and (len(inside) != len(group.members) or len({formats[member].name for member in inside}) > 1):
            what = "is a fused group that is quantized in part"
            yield Fault(group.name, "", f"{what}: {listed(inside)}")
    for group in fused_groups(formats):
        for suffix in _shared(formats[group.members[0]]):
            names = [f"{member}.{suffix}" for member in group.members]
            values = {read_scalar(source, stored[name]) for name in names if name in stored}
            if len(values) > 1 or any(not math.isfinite(value) or value <= 0 for value in values):
                what = f"is a fused group with {suffix} {sorted(values)}, expected one positive value"
                yield Fault(group.name, "", what)


def _shared(target: TargetFormat) -> list[str]:
    """Return the suffixes of the tensors that must be equal throughout a fused group."""
    return [each.suffix for each in target.tensors(_ANY, "search") if each.part == SCALAR]
