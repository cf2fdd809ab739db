"""Recognise the formats of a checkpoint's weights from its config and headers, as engines do.

Called by whatever reads an output: `output.structure`, `comparison`, `verification`, `observation`. Nothing is decided here:
what no format of the table explains is a fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weights import StoredTensor, Weight
from ..names import REGEX_PREFIX
from ..names.attention import CACHE_SCALES
from ..names.engine import WEIGHT_SUFFIX
from ..planning.config_groups import LINEAR, config_group
from ..planning.formats import FORMATS, PACKED, QUANTIZATION_CONFIG, SCALE, WEIGHT, TargetFormat

CODES = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16")
_SUFFIXES = sorted(
    {each.suffix for known in FORMATS.values() for each in known.tensors(Weight("", "", "BF16", 0, 16, 16), "search")}
)


@dataclass(frozen=True, slots=True)
class ConfigGroup:
    """A config group of one of our formats, and what it is for: names, regexes, or every layer that is not ignored."""

    format: TargetFormat
    names: frozenset[str]
    regexes: tuple[re.Pattern[str], ...]

    def names_it(self, module: str) -> bool:
        """Return whether the group is for a module by its name."""
        return module in self.names or any(regex.match(module) for regex in self.regexes)


def config_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return a checkpoint's `quantization_config`; empty where it has none."""
    found = checkpoint.config.get(QUANTIZATION_CONFIG)
    return found if isinstance(found, dict) else {}


def read_groups(config: Mapping[str, Any]) -> list[ConfigGroup]:
    """Return the config groups in their order; raises ValueError, saying what is wrong, for one of no known format."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("has no config_groups")
    return [_group(name, group) for name, group in groups.items()]


def _group(name: str, group: Any) -> ConfigGroup:
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
        raise ValueError(f"has a group {name!r} without targets")
    known = [target for target in FORMATS.values() if config_group(target, targets) == group]
    if not known:
        raise ValueError(f"has a group {name!r} of no known format")
    try:
        regexes = [re.compile(each.removeprefix(REGEX_PREFIX)) for each in targets if each.startswith(REGEX_PREFIX)]
    except re.error as error:
        raise ValueError(f"has a target that is not a regex: {error}") from None
    return ConfigGroup(known[0], frozenset(targets), tuple(regexes))


def quantized_modules(stored: Mapping[str, StoredTensor]) -> list[str]:
    """Return the modules whose weights are quantized, by their tensors, sorted."""
    found = {name.removesuffix(f".{PACKED}") for name in stored if name.endswith(f".{PACKED}")}
    for name, tensor in stored.items():
        module = name.removesuffix(WEIGHT_SUFFIX)
        if name.endswith(f".{WEIGHT}") and tensor.info.dtype == CODES and f"{module}.{SCALE}" in stored:
            found.add(module)
    return sorted(found)


def group_of(module: str, groups: Sequence[ConfigGroup]) -> ConfigGroup | None:
    """Return the group that an engine takes for a module: the first that names it, else the first for all linear layers."""
    named = (group for group in groups if group.names_it(module))
    return next(named, next((group for group in groups if LINEAR in group.names), None))


def weight_of(module: str, target: TargetFormat, stored: Mapping[str, StoredTensor]) -> Weight | None:
    """Return the weight `[N, K]` that a module's values stand for; None if they are no matrix."""
    data = stored.get(f"{module}.{target.data_suffix}")
    if data is None or len(data.info.shape) != 2:
        return None
    rows, columns = data.info.shape
    per_byte = 2 if target.data_suffix == PACKED else 1
    return Weight(module, data.shard, "BF16", data.offset, rows, columns * per_byte)


def tensor_faults(module: str, target: TargetFormat, stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, str]]:
    """Yield (tensor, what is wrong) for a module that should have a format."""
    weight = weight_of(module, target, stored)
    if weight is None:
        yield f"{module}.{target.data_suffix}", f"is missing or no matrix, which {target.name} needs"
        return
    expected = {each.suffix: each for each in target.tensors(weight, "search")}
    for suffix, each in expected.items():
        found = stored.get(f"{module}.{suffix}")
        dtypes = SCALE_DTYPES if suffix == SCALE and each.dtype == "F32" else (each.dtype,)
        if found is None or found.info.dtype not in dtypes or found.info.shape != each.shape:
            got = "missing" if found is None else f"{found.info.dtype} {list(found.info.shape)}"
            yield f"{module}.{suffix}", f"is {got}, expected {each.dtype} {list(each.shape)}"
    for suffix in _SUFFIXES:
        if suffix not in expected and f"{module}.{suffix}" in stored:
            yield f"{module}.{suffix}", "does not belong to a quantized module of this scheme"


def cache_scales(stored: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Return the scales of keys and values in an output whose config keeps these in FP8, by name."""
    if not config.get("kv_cache_scheme"):
        return {}
    return {name: tensor for name, tensor in stored.items() if name.rpartition(".")[2] in CACHE_SCALES}
