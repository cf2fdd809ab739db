"""Describe the work on one output file: copies and weights, each with its place in the source and in the output.

Made by `planning.plan`, carried out by `execution.engine`. A job looks nothing up: all is decided.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from ..checkpoint.weights import Weight


@dataclass(frozen=True, slots=True)
class CopyTensor:
    """Bytes that go over unchanged; offsets are in bytes in the source file and in the output file."""

    name: str
    source_offset: int
    offset: int
    size: int


class CopyRun(NamedTuple):
    """Bytes that lie one behind the other in the output; `ranges` are their (offset, size) in the source file."""

    offset: int
    ranges: tuple[tuple[int, int], ...]


def copy_runs(copies: Iterable[CopyTensor], limit: int) -> Iterator[CopyRun]:
    """Yield copies as they follow each other in the output, at most `limit` bytes at a time.

    So one huge tensor is not one worker's alone, and a thousand small ones are not a thousand pieces of work.
    """
    run: list[tuple[int, int]] = []
    begin = end = 0
    for copy in sorted(copies, key=attrgetter("offset")):
        done = 0
        while done < copy.size:
            if run and (copy.offset + done != end or end - begin == limit):
                yield CopyRun(begin, tuple(run))
                run = []
            if not run:
                begin = end = copy.offset + done
            size = min(copy.size - done, limit - (end - begin))
            run.append((copy.source_offset + done, size))
            done, end = done + size, end + size
    if run:
        yield CopyRun(begin, tuple(run))


@dataclass(frozen=True, slots=True)
class InputScale:
    """A group's `input_global_scale` and its place in the output file."""

    offset: int
    input_global_scale: float


class QuantizeWeight(NamedTuple):
    """A weight, its method, and the places of what it becomes, in bytes from the beginning of the output file."""

    weight: Weight
    group: str
    method: str
    packed: int
    scale: int
    global_scale: int
    input_scale: InputScale | None


@dataclass(frozen=True, slots=True)
class ShardJob:
    """All the work on one output file: `head` is its leading bytes, `size` its length in bytes."""

    name: str
    head: bytes
    size: int
    copies: tuple[CopyTensor, ...]
    weights: tuple[QuantizeWeight, ...]


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
