"""Read a checkpoint in Hugging Face layout: headers, index, config and companions, all checked before use.

`hub.opening` calls it for folders and Hub repos alike: it reads by way of a `Source` only, and no weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..errors import HeaderError, IndexMismatchError, SourceError, listed, quote
from ..limits import MAX_CONFIG_BYTES
from ..storage.files import relative_name
from .companions import (
    CONFIG,
    MODULES,
    REPLACED_FOLDED,
    FileChoice,
    sort_files,
    top_level,
    unindexed_shards,
    unnamed_shards,
    unread_hint,
)
from .header import PREFIX_BYTES, ShardHeader, TensorInfo, header_length, parse_header
from .index import check_tensors, read_weight_map, superseded
from .small_files import POINTER_BYTES, read_file, read_object, refuse_pointer
from .source import FolderSource, Source
from .strict_json import StrictJsonError, parse_json
from .weights import StoredTensor

HEADERS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file; `digest` is the SHA-256 of its header bytes, hexadecimal."""

    name: str
    size: int
    header: ShardHeader
    digest: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint came from: a local folder, a Hub repo at a commit, or, where that is in the cache, both."""

    folder: Path | None
    repo_id: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """What the model is called: the repo's id, else the folder's name."""
        return self.repo_id or (self.folder.resolve().name if self.folder is not None else "")

    @property
    def local(self) -> Path:
        """The folder; raises SourceError for a repo that is read by range."""
        if self.folder is None:
            raise SourceError(f"{quote(self)} is not on this machine: keep the source in the Hub's cache")
        return self.folder

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.repo_id else str(self.folder)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything known of a checkpoint before one weight is read; `source` reads the bytes of its files.

    `left_out` maps the files that a conversion does not take, and copies of tensors that the index has elsewhere, to their sizes
    in bytes. `has_index`: there is an index, or several shards, whose output gets one.
    """

    origin: Origin
    source: Source
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    companions: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    has_index: bool = True
    _by_name: dict[str, Shard] = field(default_factory=dict, repr=False)

    def tensors(self) -> Iterator[StoredTensor]:
        """Yield every tensor, shard by shard in name order, in the order of the data."""
        for shard in self.shards:
            yield from stored_tensors(shard)

    def shard(self, name: str) -> Shard:
        """Return the shard of that name."""
        if not self._by_name:
            self._by_name.update({shard.name: shard for shard in self.shards})
        return self._by_name[name]

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(shard.header.data_bytes for shard in self.shards)


def stored_tensors(shard: Shard) -> Iterator[StoredTensor]:
    """Yield a shard's tensors with their places in its file."""
    for info in shard.header.tensors:
        yield StoredTensor(info, shard.name, shard.header.data_start + info.start)


def read_checkpoint(origin: Origin, source: Source | None = None, choice: FileChoice | None = None) -> Checkpoint:
    """Return the checkpoint that `source` reads, by default the folder of `origin`; closes the source where it fails.

    Raises SourceError and its subclasses for whatever is missing, inconsistent or unsafe.
    """
    choice = choice or FileChoice()
    if source is None:
        assert origin.folder is not None
        source = FolderSource(origin.folder, follow_links=choice.follow_links)
    try:
        return _read_checkpoint(origin, source, choice)
    except BaseException:
        source.close()
        raise


def _no_config(origin: Origin, files: Iterable[str]) -> str:
    """Return what to say of a place without config.json: it names the folders inside that have one."""
    inner = [name.removesuffix(f"/{CONFIG}") for name in files if name.endswith(f"/{CONFIG}")]
    hint = f"; these folders in it have one: {listed(inner)}" if inner else unread_hint(top_level(files))
    return f"{quote(origin)} is no checkpoint in Hugging Face layout: it holds no {CONFIG}{hint}"


def _read_checkpoint(origin: Origin, source: Source, choice: FileChoice) -> Checkpoint:
    files = source.files()
    choice.check(files)
    if CONFIG not in files:
        raise SourceError(_no_config(origin, files))
    config = read_object(source, CONFIG, MAX_CONFIG_BYTES)
    weight_map = read_weight_map(source, files)
    indexed = unindexed_shards(files, choice) if weight_map is None else sorted(set(weight_map.values()))
    shards = read_shards(source, indexed)
    stale = superseded(shards, weight_map or {})
    shards = tuple([_without(shard, stale.get(shard.name, ())) for shard in shards])
    check_tensors(shards, weight_map)
    shards = _with_unnamed(source, shards, choice)
    names = [shard.name for shard in shards]
    found = sort_files(files, names, _module_folders(source, files))
    for name in found.companions:
        _check_companion(source, name)
    _check_case([*names, *found.companions, *(name for name in files if name.casefold() in REPLACED_FOLDED)])
    has_index = weight_map is not None or len(shards) > 1
    copies = {f"{info.name} in {name}": info.nbytes for name, tensors in stale.items() for info in tensors}
    return Checkpoint(origin, source, shards, config, found.companions, {**found.left_out, **copies}, has_index)


def _without(shard: Shard, tensors: Collection[TensorInfo]) -> Shard:
    if not tensors:
        return shard
    kept = tuple([info for info in shard.header.tensors if info not in tensors])
    return replace(shard, header=replace(shard.header, tensors=kept))


def _check_companion(source: Source, name: str) -> None:
    """Raise SourceError for a companion that cannot be copied, before anything is written."""
    relative_name(name)
    if isinstance(source, FolderSource):  # what the Hub serves is never a pointer
        size = source.size(name)
        if size <= POINTER_BYTES:
            refuse_pointer(name, read_file(source, name, POINTER_BYTES))


def _module_folders(source: Source, files: Mapping[str, int]) -> set[str]:
    """Return the folders that `modules.json` of sentence-transformers names."""
    if MODULES not in files:
        return set()
    try:
        found = parse_json(read_file(source, MODULES, MAX_CONFIG_BYTES), infinity=True)
    except StrictJsonError:
        return set()
    entries = found if isinstance(found, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return {path.partition("/")[0] for path in paths if isinstance(path, str) and path}


def read_shards(source: Source, names: Iterable[str]) -> tuple[Shard, ...]:
    """Return shards with their headers, several read at once where each is a request."""
    if isinstance(source, FolderSource):
        return tuple(read_shard(source, name) for name in names)
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        return tuple(pool.map(partial(read_shard, source), names))


def read_shard(source: Source, name: str) -> Shard:
    """Return a shard with its header read and checked."""
    size = source.size(name)
    first = bytearray(min(PREFIX_BYTES + 1, size))
    try:
        source.read_into(name, 0, memoryview(first))
        raw = bytearray(header_length(bytes(first[:PREFIX_BYTES]), size))
        if first[PREFIX_BYTES:] == b"{":  # a header of other bytes is refused unread
            source.read_into(name, PREFIX_BYTES, memoryview(raw))
        header = parse_header(bytes(raw), size)
    except HeaderError as error:
        if size <= POINTER_BYTES:
            refuse_pointer(name, read_file(source, name, POINTER_BYTES))
        raise HeaderError(f"{quote(name)}: {error}") from None
    return Shard(name, size, header, hashlib.sha256(raw).hexdigest())


def _with_unnamed(source: Source, shards: tuple[Shard, ...], choice: FileChoice) -> tuple[Shard, ...]:
    """Return the shards, with those that the user includes; raises IndexMismatchError for tensors that would be lost."""
    known = {info.name for shard in shards for info in shard.header.tensors}
    added = []
    for name in unnamed_shards(source.files(), {shard.name for shard in shards}, choice):
        shard = read_shard(source, name)
        if choice.includes(name):
            added.append(shard)
            continue
        new = [info.name for info in shard.header.tensors if info.name not in known]
        if new:
            raise IndexMismatchError(
                f"{quote(name)} is named by no index and holds {len(new)} tensors that no shard has ({quote(new[0])}, ...): "
                "say whether to include the file or to skip it"
            )
    together = tuple(sorted((*shards, *added), key=attrgetter("name")))
    check_tensors(together, None)
    return together


def _check_case(names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(relative_name(name).casefold(), name)
        if other != name:
            raise SourceError(f"{quote(other)} and {quote(name)} differ in case only: they clash on some systems")
