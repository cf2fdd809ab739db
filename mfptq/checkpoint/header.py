"""Parse and lay out the headers of safetensors files: every rule of the format is checked, nothing is read or written.

Format: https://github.com/huggingface/safetensors#format. A shard is an 8-byte little-endian length, that many bytes of
JSON, then the data that the JSON's offsets must cover exactly, without overlap or hole. Called by `folder` to parse, by
`planning.building` and `calibration.file` to lay out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from json.encoder import encode_basestring
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from ..dtypes import DTYPE_BITS
from ..errors import HeaderError, quote
from ..limits import MAX_DIMENSION, MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_TENSOR_NAME_BYTES, MAX_TENSORS
from .strict_json import StrictJsonError, parse_json

PREFIX_BYTES = 8
METADATA_KEY = "__metadata__"
PT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})

_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}


class TensorInfo(NamedTuple):
    """One tensor of a shard: `start` and `end` are bytes from the beginning of the shard's data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """A shard's tensors in the order of their data; `data_start` is the offset of the data in the file, in bytes."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def data_bytes(self) -> int:
        """Size of the data behind the header, in bytes."""
        return self.tensors[-1].end if self.tensors else 0


def header_length(prefix: bytes, file_size: int) -> int:
    """Return how many bytes of JSON follow the first 8 bytes of a shard of `file_size` bytes, or raise HeaderError."""
    if file_size < PREFIX_BYTES or len(prefix) < PREFIX_BYTES:
        raise HeaderError(f"shard is {file_size} bytes, need at least {PREFIX_BYTES}")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"header length is {length}, expected at most {MAX_HEADER_BYTES}")
    if length > file_size - PREFIX_BYTES:
        raise HeaderError(f"header length is {length}, but only {file_size - PREFIX_BYTES} bytes follow: truncated?")
    return length


def parse_header(raw: bytes, file_size: int) -> ShardHeader:
    """Return the header whose JSON is `raw`, of a shard of `file_size` bytes in all.

    Raises HeaderError for anything that the format does not allow, and nothing else, for any bytes.
    """
    if raw[:1] != b"{":
        raise HeaderError("header does not begin with '{'")
    try:
        entries = parse_json(raw.rstrip(b" "))
    except StrictJsonError as error:
        raise HeaderError(f"header: {error}") from None
    metadata = _metadata(entries.pop(METADATA_KEY, {}))
    if len(entries) > MAX_TENSORS:
        raise HeaderError(f"{len(entries)} tensors, expected at most {MAX_TENSORS}")
    tensors = sorted((_tensor(name, entry) for name, entry in entries.items()), key=lambda t: (t.start, t.end))
    data_start = PREFIX_BYTES + len(raw)
    _check_cover(tensors, file_size - data_start)
    return ShardHeader(tuple(tensors), metadata, data_start)


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise HeaderError(f"{METADATA_KEY} is not an object of strings")
    return value


def _tensor(name: str, entry: Any) -> TensorInfo:
    try:
        if len(name) > MAX_TENSOR_NAME_BYTES or (not name.isascii() and len(name.encode()) > MAX_TENSOR_NAME_BYTES):
            raise HeaderError(f"tensor name {quote(name)} is longer than {MAX_TENSOR_NAME_BYTES} bytes")
    except UnicodeEncodeError:
        raise HeaderError(f"tensor name {quote(name)} is not valid Unicode") from None
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"tensor {quote(name)}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise HeaderError(f"tensor {quote(name)}: unsupported dtype {quote(dtype)}")
    if not _are_naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise HeaderError(f"tensor {quote(name)}: shape is not a list of at most {MAX_DIMENSIONS} whole numbers")
    if not _are_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"tensor {quote(name)}: data_offsets are not [begin, end] with begin <= end")
    expected = tensor_bytes(dtype, shape)
    if expected != offsets[1] - offsets[0]:
        raise HeaderError(
            f"tensor {quote(name)}: {dtype} {shape} needs {expected} bytes, data_offsets give {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_naturals(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 - twice as fast as a generator, for two lists of every tensor
        if type(item) is not int or not 0 <= item <= MAX_DIMENSION:
            return False
    return True


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int | None:
    """Return the size in bytes of a tensor, or None if its last byte would be shared (sub-byte dtypes)."""
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    return bits // 8 if bits % 8 == 0 else None


def _check_cover(tensors: list[TensorInfo], data_bytes: int) -> None:
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before it"
            raise HeaderError(f"tensor {quote(tensor.name)} begins at byte {tensor.start}, expected {end}: it {what}")
        end = tensor.end
    if end != data_bytes:
        hint = "truncated?" if end > data_bytes else "bytes that belong to no tensor"
        raise HeaderError(f"tensors end at byte {end} of the data, but the shard holds {data_bytes}: {hint}")


class TensorSpec(NamedTuple):
    """A tensor to be written: everything but its place. `part` 0 comes first in the file, then 1, and so on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: int = 0


class Layout(NamedTuple):
    """A shard to be written: its leading bytes, where each tensor begins in the file, and its length, all in bytes."""

    head: bytes
    places: dict[str, int]
    size: int


def lay_out(specs: Iterable[TensorSpec], metadata: Mapping[str, str] = PT_METADATA) -> Layout:
    """Return a shard's leading bytes, length prefix included, and the places of its tensors.

    Of one part, the bytes are those that safetensors itself writes for these tensors with metadata {"format": "pt"}:
    largest dtype first, then by name; compact JSON, padded with spaces so that the data begins at a multiple of 8.
    """
    ordered = list(_in_order(specs))
    known = {pair: _described(*pair) for pair in {(spec.dtype, spec.shape) for spec in ordered}}
    texts = [known[dtype, shape] for _, dtype, shape, _ in ordered]
    starts = list(accumulate((size for _, size in texts), initial=0))
    noted = json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False)
    entries = [f"{encode_basestring(METADATA_KEY)}:{noted}"]
    entries += [  # as the encoder itself writes them, which takes ten times as long
        f"{encode_basestring(spec.name)}:{{{text}{start},{end}]}}"
        for spec, (text, _), start, end in zip(ordered, texts, starts, starts[1:], strict=False)
    ]
    encoded = f"{{{','.join(entries)}}}".encode()
    encoded += b" " * (-(PREFIX_BYTES + len(encoded)) % PREFIX_BYTES)
    data_start = PREFIX_BYTES + len(encoded)
    head = len(encoded).to_bytes(PREFIX_BYTES, "little") + encoded
    places = {spec.name: data_start + start for spec, start in zip(ordered, starts, strict=False)}
    return Layout(head, places, data_start + starts[-1])


def _described(dtype: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """Return what a header says of a tensor, up to its offsets, and its size in bytes."""
    size = tensor_bytes(dtype, shape)
    assert size is not None
    return f'"dtype":"{dtype}","shape":[{",".join(map(str, shape))}],"data_offsets":[', size


def encode_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str] = PT_METADATA) -> tuple[bytes, ShardHeader]:
    """Return a shard's leading bytes, as `lay_out` does, and the header they stand for."""
    head, places, size = lay_out(specs := list(specs), metadata)
    by_name = {spec.name: spec for spec in specs}
    ends = [*list(places.values())[1:], size]
    tensors = tuple(
        TensorInfo(name, by_name[name].dtype, by_name[name].shape, start - len(head), end - len(head))
        for (name, start), end in zip(places.items(), ends, strict=True)
    )
    return head, ShardHeader(tensors, metadata, len(head))


def _in_order(specs: Iterable[TensorSpec]) -> Iterator[TensorSpec]:
    """Yield tensors part by part, of each part the largest dtype first, then by name, whose UTF-8 sorts as the text does."""
    runs: dict[tuple[int, int], list[TensorSpec]] = {}
    for spec in specs:
        runs.setdefault((spec.part, -_DTYPE_RANK[spec.dtype]), []).append(spec)
    for _, run in sorted(runs.items()):
        yield from sorted(run, key=attrgetter("name"))
