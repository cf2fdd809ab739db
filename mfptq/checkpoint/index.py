"""Read the index, and check it against the headers of the shards: every tensor in one file, and in the one it names.

Called by `folder`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from ..errors import IndexMismatchError, SourceError, quote
from ..limits import MAX_INDEX_BYTES, MAX_TENSORS
from ..storage.files import plain_name
from .companions import INDEX, SHARD_SUFFIX, find_index
from .small_files import read_object
from .source import Source

if TYPE_CHECKING:
    from .folder import Shard
    from .header import TensorInfo


def read_weight_map(source: Source, files: Mapping[str, int]) -> dict[str, str] | None:
    """Return the file of every tensor as the index has it; None where there is no index."""
    if find_index(files) is None:
        return None
    weight_map = read_object(source, INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise IndexMismatchError(f"{INDEX}: weight_map is missing or does not map tensor names to file names")
    if not weight_map:
        raise IndexMismatchError(f"{INDEX}: weight_map is empty")
    for name in set(weight_map.values()):
        plain_name(name)
        if not name.endswith(SHARD_SUFFIX):
            raise IndexMismatchError(f"{INDEX}: {quote(name)} is not a safetensors file")
        if name not in files:
            raise IndexMismatchError(f"{INDEX} names shard {quote(name)}, which is missing: download it again")
    return weight_map


def superseded(shards: Collection[Shard], weight_map: Mapping[str, str]) -> dict[str, list[TensorInfo]]:
    """Return the tensors of each shard of which the index names another copy, in a shard laid over this one."""
    elsewhere = [
        (shard.name, info)
        for shard in shards
        for info in shard.header.tensors
        if weight_map.get(info.name, shard.name) != shard.name
    ]
    if not elsewhere:
        return {}
    places = {(shard.name, info.name) for shard in shards for info in shard.header.tensors}
    found: dict[str, list[TensorInfo]] = {}
    for name, info in elsewhere:
        if (weight_map[info.name], info.name) in places:
            found.setdefault(name, []).append(info)
    return found


def check_tensors(shards: Iterable[Shard], weight_map: Mapping[str, str] | None) -> None:
    """Raise IndexMismatchError for tensors in two shards, or in others than the index says, if there is one."""
    home: dict[str, str] = {}
    for shard in shards:
        for info in shard.header.tensors:
            if info.name in home:
                places = f"{quote(home[info.name])} and {quote(shard.name)}"
                raise IndexMismatchError(f"tensor {quote(info.name)} is in two shards: {places}")
            home[info.name] = shard.name
    if len(home) > MAX_TENSORS:
        raise SourceError(f"{len(home)} tensors, expected at most {MAX_TENSORS}")
    if weight_map is None or weight_map == home:
        return
    for name, shard_name in weight_map.items():
        if home.get(name) != shard_name:
            found = f"found in {quote(home[name])}" if name in home else "not found in any shard"
            raise IndexMismatchError(f"{INDEX} puts tensor {quote(name)} in {quote(shard_name)}, {found}")
    extra = next(name for name in home if name not in weight_map)
    raise IndexMismatchError(f"tensor {quote(extra)} of {quote(home[extra])} is missing from {INDEX}")
