"""A folder in Hugging Face layout as a `Checkpoint`: headers, index, config and companions, all checked before use."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HeaderError, IndexMismatchError, SourceError, quote
from ..limits import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, MAX_TENSORS
from ..storage.files import confined, plain_name, read_small
from .header import PREFIX_BYTES, ShardHeader, header_length, parse_header
from .source import FileStamp, FolderSource
from .strict_json import StrictJsonError, parse_json
from .weights import StoredTensor

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SHARD_SUFFIX = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NOT_COMPANIONS = (*_PICKLES, SHARD_SUFFIX, ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".index.json", ".npz", ".npy")
_REPLACED = {CONFIG, "hf_quant_config.json", "README.md", "SHA256SUMS", "mfptq_report.json"}
_REPLACED_FOLDED = {name.casefold() for name in _REPLACED}  # some systems take README.md and readme.md for one file


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file; `digest` is the SHA-256 of its header bytes, hexadecimal."""

    name: str
    size: int
    header: ShardHeader
    digest: str
    stamp: FileStamp


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint came from: a Hub repo at a commit, or a local folder only."""

    folder: Path
    repo_id: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.repo_id else str(self.folder)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything known of a checkpoint before one weight is read; `source` reads the bytes of its files."""

    origin: Origin
    source: FolderSource
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    companions: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
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


def read_checkpoint(origin: Origin) -> Checkpoint:
    """Return the checkpoint in `origin.folder`; opens its files for reading only.

    Raises SourceError and its subclasses for whatever is missing, inconsistent or unsafe.
    """
    source = FolderSource(origin.folder)
    try:
        return _read_checkpoint(origin, source)
    except BaseException:
        source.close()
        raise


def _read_checkpoint(origin: Origin, source: FolderSource) -> Checkpoint:
    root = origin.folder
    names = _file_names(root)
    config = read_object(root, CONFIG, MAX_CONFIG_BYTES)
    weight_map = _weight_map(root, names)
    shard_names = sorted(set(weight_map.values())) if weight_map is not None else _shard_names(names)
    shards = tuple(read_shard(source, name) for name in shard_names)
    _check_tensors(shards, weight_map)
    companions = tuple(name for name in names if _is_companion(name))
    for name in companions:
        confined(root, name)
    left_out = tuple(name for name in names if name not in {*companions, *shard_names, *_REPLACED, INDEX})
    _check_case([*companions, *shard_names, *(name for name in names if name.casefold() in _REPLACED_FOLDED)])
    return Checkpoint(origin, source, shards, config, companions, left_out, weight_map is not None)


def _file_names(root: Path) -> list[str]:
    try:
        entries = sorted(os.listdir(root))  # noqa: PTH208 - names are data here, not paths
    except NotADirectoryError:
        raise SourceError(f"{quote(root)} is a file, expected a folder in Hugging Face layout") from None
    except OSError as error:
        raise SourceError(f"cannot read folder {quote(root)}: {error.strerror}") from None
    return [name for name in entries if not name.startswith(".") and (name == CONFIG or not (root / name).is_dir())]


def _is_companion(name: str) -> bool:
    return name.casefold() not in _REPLACED_FOLDED and not name.lower().endswith(_NOT_COMPANIONS)


def read_object(root: Path, name: str, limit: int) -> dict[str, Any]:
    """Return the JSON object in a file of the folder; Infinity and NaN are taken as configs hold them."""
    try:
        value = parse_json(read_small(confined(root, name), limit), infinity=True)
    except StrictJsonError as error:
        raise SourceError(f"{quote(name)}: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{quote(name)} is not a JSON object")
    return value


def _weight_map(root: Path, names: list[str]) -> dict[str, str] | None:
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if not indexes:
        return None
    if indexes != [INDEX]:
        raise IndexMismatchError(f"expected one index named {INDEX}, got {', '.join(map(quote, indexes))}")
    weight_map = read_object(root, INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise IndexMismatchError(f"{INDEX}: weight_map is missing or does not map tensor names to file names")
    if not weight_map:
        raise IndexMismatchError(f"{INDEX}: weight_map is empty")
    for name in set(weight_map.values()):
        plain_name(name)
        if not name.endswith(SHARD_SUFFIX):
            raise IndexMismatchError(f"{INDEX}: {quote(name)} is not a safetensors file")
        if name not in names:
            raise IndexMismatchError(f"{INDEX} names shard {quote(name)}, which is missing: download it again")
    return weight_map


def _shard_names(names: list[str]) -> list[str]:
    shards = [name for name in names if name.endswith(SHARD_SUFFIX)]
    if not shards:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        hint = f"; pickle checkpoints ({quote(pickles[0])}) are not read" if pickles else ""
        raise SourceError(f"no safetensors file here: expected {SINGLE} or shards with {INDEX}{hint}")
    return [SINGLE] if SINGLE in shards else shards


def read_shard(source: FolderSource, name: str) -> Shard:
    """Return a shard with its header read and checked."""
    size = source.size(name)
    try:
        prefix = bytearray(min(PREFIX_BYTES, size))
        source.read_into(name, 0, memoryview(prefix))
        raw = bytearray(header_length(bytes(prefix), size))
        source.read_into(name, PREFIX_BYTES, memoryview(raw)[:1])
        if raw[:1] == b"{":  # a header of other bytes is refused unread
            source.read_into(name, PREFIX_BYTES, memoryview(raw))
        header = parse_header(bytes(raw), size)
    except HeaderError as error:
        raise HeaderError(f"{quote(name)}: {error}") from None
    return Shard(name, size, header, hashlib.sha256(raw).hexdigest(), source.stamp(name))


def _check_tensors(shards: tuple[Shard, ...], weight_map: dict[str, str] | None) -> None:
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


def _check_case(names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(plain_name(name).casefold(), name)
        if other != name:
            raise SourceError(f"{quote(other)} and {quote(name)} differ in case only: they clash on some systems")
