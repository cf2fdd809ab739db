"""Describe the work on one output file: copies and weights, each with its place in the source and in the output.

Made by `planning.plan`, carried out by `execution.engine`. A job looks nothing up: all is decided.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.header import PREFIX_BYTES, TensorSpec, lay_out
from ..checkpoint.weights import Weight, layer_pattern
from ..errors import SourceError, quote
from ..limits import MAX_HEADER_BYTES

if TYPE_CHECKING:
    from .formats import TargetFormat


CAST = "cast"  # the method of weights whose codes go over as they are: FP8, and MXFP4 to NVFP4


@dataclass(frozen=True, slots=True)
class CopyTensor:
    """Bytes that go over; offsets are in bytes in the source file and in the output file.

    They lie in the source file `shard`, and go over unchanged; block scales, which are looked at, by way of `table`: byte b
    becomes `table[b]`.
    """

    name: str
    source_offset: int
    offset: int
    size: int
    shard: str = ""
    table: bytes | None = None


class Scalar(NamedTuple):
    """A float32 number that the plan knows already, and its place in the output file."""

    offset: int
    value: float


class WidenTensor(NamedTuple):
    """A tensor that is kept and stored as codes: its values go to `offset` in the output file, in bytes."""

    weight: Weight
    offset: int


class CopyRun(NamedTuple):
    """Bytes that lie one behind the other in the output; `ranges` are their (offset, size) in the source file.

    `shard` is that file, "" for the one of the output's own name; `table` is that of `CopyTensor`.
    """

    offset: int
    ranges: tuple[tuple[int, int], ...]
    shard: str = ""
    table: bytes | None = None


def copy_runs(copies: Iterable[CopyTensor], limit: int) -> Iterator[CopyRun]:
    """Yield copies as they follow each other in the output, at most `limit` bytes at a time.

    So one huge tensor is not one worker's alone, and a thousand small ones are not a thousand pieces of work.
    """
    run: list[tuple[int, int]] = []
    begin = end = 0
    origin: tuple[str, bytes | None] = "", None
    for copy in sorted(copies, key=attrgetter("offset")):
        done = 0
        while done < copy.size:
            if run and (copy.offset + done != end or end - begin == limit or origin != (copy.shard, copy.table)):
                yield CopyRun(begin, tuple(run), *origin)
                run = []
            if not run:
                begin = end = copy.offset + done
                origin = copy.shard, copy.table
            size = min(copy.size - done, limit - (end - begin))
            run.append((copy.source_offset + done, size))
            done, end = done + size, end + size
    if run:
        yield CopyRun(begin, tuple(run), *origin)


class QuantizeWeight(NamedTuple):
    """A weight, its format and method, and the places of what it becomes, in bytes from the beginning of the output file.

    `values` is where its values begin, `scale` its scale or scales; `global_scale` is -1 where a format has none, `input_scale`
    None.
    """

    weight: Weight
    group: str
    format: TargetFormat
    method: str
    values: int
    scale: int
    global_scale: int
    input_scale: Scalar | None


def stats_key(step: QuantizeWeight) -> str:
    """Return the key of a weight's statistics: its format, then its name with the layer's number and `*` for all others."""
    return f"{step.format.name} {layer_pattern(step.weight.module)}"


@dataclass(frozen=True, slots=True)
class ShardJob:
    """All the work on one output file: `head` is its leading bytes, `size` its length in bytes."""

    name: str
    head: bytes
    size: int
    copies: tuple[CopyTensor, ...]
    weights: tuple[QuantizeWeight, ...]
    widened: tuple[WidenTensor, ...] = ()
    scalars: tuple[Scalar, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """An output file laid out, in little memory: its leading bytes compressed, the places of its tensors as numbers.

    `places` are offsets in the file, in the order of `output_specs`; `size` and `tensor_bytes` are in bytes.
    """

    name: str
    size: int
    tensor_bytes: int
    places: array[int] = field(repr=False)
    packed_head: bytes = field(repr=False)

    @property
    def tensors(self) -> int:
        """How many tensors the file will have."""
        return len(self.places)

    @property
    def head(self) -> bytes:
        """The file's leading bytes: length prefix and header."""
        return zlib.decompress(self.packed_head)


def largest_first(shards: Sequence[ShardPlan]) -> list[ShardPlan]:
    """Return shards in the order of work: much larger files first.

    SHA-256 of one file is sequential, and would otherwise be the last thing running.
    Those of about one size stay in their order, since neighbours may hold parts of one fused group.
    """
    mean = sum(shard.size for shard in shards) / max(1, len(shards))
    return sorted(shards, key=lambda shard: -round(shard.size / mean))


def plan_shard(shard: str, specs: list[TensorSpec], places: dict[str, str]) -> ShardPlan:
    """Return the file of these tensors, laid out; `places`, the file of every tensor so far, takes them in."""
    own = dict.fromkeys([spec.name for spec in specs], shard)
    if len(own) < len(specs) or not places.keys().isdisjoint(own):
        name = next(name for name, count in Counter([*places, *(spec.name for spec in specs)]).items() if count > 1)
        raise SourceError(f"two tensors would be written as {quote(name)}: rename one in the source")
    places.update(own)
    head, offsets, size = lay_out(specs)
    if len(head) - PREFIX_BYTES > MAX_HEADER_BYTES:
        raise SourceError(f"{quote(shard)} would need a header of {len(head)} bytes, the format allows 100 MB")
    return ShardPlan(
        shard, size, size - len(head), array("q", [offsets[spec.name] for spec in specs]), zlib.compress(head, 1)
    )
