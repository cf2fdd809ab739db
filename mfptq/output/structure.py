"""Check what an output's files say of each other: shapes, dtypes, config, fused scales, index.

Called by `verification`. Reads headers and scalars, never weights; what is wrong is yielded, not raised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from ..checkpoint.acceptance import refusal
from ..checkpoint.folder import CONFIG, INDEX, Checkpoint, read_object
from ..checkpoint.source import Source
from ..checkpoint.weights import WEIGHT_SUFFIX, StoredTensor
from ..errors import listed, quote
from ..limits import MAX_INDEX_BYTES
from ..names.engine import built_modules, experts_module
from ..names.fusion import fused_groups, parameters
from ..names.patterns import REGEX_PREFIX
from ..nvfp4 import BLOCK_SIZE
from ..planning.defaults import siblings_of
from ..planning.quantization_config import FORMAT, QUANTIZATION_CONFIG, head_targets
from .fault import Fault

PACKED = ".weight_packed"


def structure_faults(checkpoint: Checkpoint) -> Iterator[Fault]:
    """Yield what is wrong with an output by itself, its weights and digests apart."""
    for shard in checkpoint.shards:
        if problem := refusal(checkpoint.origin.local / shard.name, len(shard.header.tensors)):
            yield Fault("", shard.name, problem)
    stored = {tensor.info.name: tensor for tensor in checkpoint.tensors()}
    modules = sorted(name.removesuffix(PACKED) for name in stored if name.endswith(PACKED))
    config = checkpoint.config.get(QUANTIZATION_CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        yield Fault("", CONFIG, f"has no {QUANTIZATION_CONFIG} of format {FORMAT}")
        return
    groups = config.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    known = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    with_input = any(group.get("input_activations") is not None for group in known)
    alone = {name for group in known if group.get("input_activations") is None for name in group.get("targets", ())}
    linear = [name for name, tensor in stored.items() for name in _first_built(name, tensor.info.shape)]
    found = [
        fault
        for module in modules
        for fault in _shape_faults(module, stored, with_input=with_input and module not in alone)
    ]
    found += _ignore_faults(config.get("ignore"), modules, linear)
    found += _target_faults(first.get("targets") if isinstance(first, dict) else None, modules)
    yield from found or _fusion_faults(checkpoint.source, stored, modules, linear)
    if checkpoint.has_index:
        metadata = read_object(checkpoint.source, INDEX, MAX_INDEX_BYTES).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total != checkpoint.tensor_bytes:
            yield Fault("", INDEX, f"says total_size {total}, the tensors have {checkpoint.tensor_bytes}")


def _shape_faults(module: str, stored: Mapping[str, StoredTensor], *, with_input: bool) -> Iterator[Fault]:
    packed = stored[module + PACKED].info
    if packed.dtype != "U8" or len(packed.shape) != 2 or packed.shape[1] % (BLOCK_SIZE // 2):
        yield Fault(packed.name, "", f"is {packed.dtype} {list(packed.shape)}, expected U8 [N, K/2]")
        return
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        ".weight_scale": ("F8_E4M3", (packed.shape[0], packed.shape[1] * 2 // BLOCK_SIZE)),
        ".weight_global_scale": ("F32", (1,)),
    }
    if with_input:
        expected[".input_global_scale"] = ("F32", (1,))
    for suffix, (dtype, shape) in expected.items():
        found = stored.get(module + suffix)
        if found is None or (found.info.dtype, found.info.shape) != (dtype, shape):
            got = "missing" if found is None else f"{found.info.dtype} {list(found.info.shape)}"
            yield Fault(module + suffix, "", f"is {got}, expected {dtype} {list(shape)}")
    for suffix in (WEIGHT_SUFFIX, *(() if with_input else (".input_global_scale",))):
        if module + suffix in stored:
            yield Fault(module + suffix, "", "does not belong to a quantized module of this scheme")


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


def _target_faults(targets: object, modules: Iterable[str]) -> Iterator[Fault]:
    for pattern in head_targets(modules):
        if not isinstance(targets, list) or pattern not in targets:
            yield Fault("", CONFIG, f"lacks the target {quote(pattern)}, without which engines find no quantized head")


def _first_built(name: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Yield the layers that engines build for a kept matrix, or for the first of kept experts, which decides for all."""
    if len(shape) == 2 or (len(shape) == 3 and experts_module(name, shape)):
        yield from built_modules(name, (1, *shape[1:]) if len(shape) == 3 else shape)


def _fusion_faults(
    source: Source, stored: Mapping[str, StoredTensor], modules: list[str], linear: list[str]
) -> Iterator[Fault]:
    quantized = set(modules)
    for group in parameters([*modules, *linear], siblings_of([*stored, *modules])):
        inside = [member for member in group.members if member in quantized]
        if inside and len(inside) != len(group.members):
            yield Fault(group.name, "", f"is a fused group that is quantized in part: {listed(inside)}")
    for group in fused_groups(modules):
        for suffix in (".weight_global_scale", ".input_global_scale"):
            values = {read_scalar(source, stored[m + suffix]) for m in group.members if m + suffix in stored}
            if len(values) > 1 or any(not math.isfinite(value) or value <= 0 for value in values):
                what = f"is a fused group with {suffix[1:]} {sorted(values)}, expected one positive value"
                yield Fault(group.name, "", what)


def read_scalar(source: Source, tensor: StoredTensor) -> float:
    """Return the float32 that a tensor holds."""
    return float(read_bytes(source, tensor, 0, 4).view(np.float32)[0])


def read_bytes(source: Source, tensor: StoredTensor, start: int, size: int) -> npt.NDArray[np.uint8]:
    """Return `size` bytes of a tensor from byte `start` on."""
    buffer = np.empty(size, np.uint8)
    source.read_into(tensor.shard, tensor.offset + start, buffer.data)
    return buffer
