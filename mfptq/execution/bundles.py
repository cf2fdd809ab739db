"""Many small fused groups as one piece of work: what they are, and where they come from and go to, as arrays.

A model with a hundred thousand small experts must not cost a hundred thousand times what one tensor costs beyond its bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..checkpoint.weights import name_pattern
from ..dtypes import DTYPE_BITS
from ..kernels import ErrorStats, Float64Array, Int64Array
from ..nvfp4 import BLOCK_SIZE, ByteArray, Float32Array
from ..planning.jobs import QuantizeWeight
from ..storage.partial_file import Piece
from .tiles import GroupStep


@dataclass(frozen=True, slots=True)
class Bundle:
    """Whole groups of one shard and dtype, read at once: weight i has elements `starts[i]` to `starts[i + 1]`.

    `reads` are the stretches of the source file, (offset, size) in bytes, in which the weights lie, in their order.
    """

    groups: tuple[GroupStep, ...]
    steps: tuple[QuantizeWeight, ...]
    starts: Int64Array
    reads: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, groups: Sequence[GroupStep]) -> Bundle:
        """Return the bundle of some groups."""
        steps = tuple(step for group in groups for step in group.weights)
        sizes = [step.weight.rows * step.weight.columns for step in steps]
        places = np.array([step.weight.offset for step in steps])
        nbytes = np.array(sizes) * (DTYPE_BITS[steps[0].weight.dtype] // 8)
        starts = np.cumsum([0, *sizes], dtype=np.int64)
        return cls(tuple(groups), steps, starts, tuple(_stretches(places, nbytes)))

    @property
    def dtype(self) -> str:
        """The dtype of all its weights."""
        return self.steps[0].weight.dtype

    def of_groups(self, amax: Float32Array) -> Float32Array:
        """Return the largest of each group's values, of one value for each weight."""
        first = np.cumsum([0, *(len(group.weights) for group in self.groups[:-1])])
        return np.maximum.reduceat(amax, first)

    def for_weights(self, scales: Sequence[float]) -> Float32Array:
        """Return each weight's value, of one for each group."""
        return np.repeat(np.array(scales, np.float32), [len(group.weights) for group in self.groups])

    def pieces(self, packed: ByteArray, scales: ByteArray, divisors: Float32Array) -> Iterator[Piece]:
        """Yield what is to be written, neighbours together."""
        sizes = np.diff(self.starts)
        yield from _joined(np.array([step.packed for step in self.steps]), sizes // 2, packed)
        yield from _joined(np.array([step.scale for step in self.steps]), sizes // BLOCK_SIZE, scales)
        places, values = [step.global_scale for step in self.steps], divisors
        inputs = [step.input_scale for step in self.steps if step.input_scale is not None]
        if inputs:
            places = [*places, *(each.offset for each in inputs)]
            values = np.concatenate([values, np.array([each.divisor for each in inputs], np.float32)])
        order = np.argsort(places)
        stored = np.ascontiguousarray(values[order].astype("<f4")).view(np.uint8)
        yield from _joined(np.array(places)[order], np.full(len(places), 4), stored)

    def by_kind(self, stats: Float64Array) -> dict[str, ErrorStats]:
        """Return the statistics `[n, 7]` of the weights, those of a kind together."""
        rows: dict[str, list[int]] = {}
        for row, step in enumerate(self.steps):
            rows.setdefault(name_pattern(step.weight.module), []).append(row)
        sizes = np.diff(self.starts)
        return {kind: ErrorStats.together(int(sizes[found].sum()), stats[found]) for kind, found in rows.items()}


def bundles(groups: Iterable[GroupStep], tile_bytes: int) -> Iterator[Bundle]:
    """Yield runs of groups of one dtype that together fit into one tile."""
    run: list[GroupStep] = []
    size, dtype = 0, ""
    for group in groups:
        nbytes, own = group.nbytes, group.weights[0].weight.dtype
        if run and (size + nbytes > tile_bytes or own != dtype):
            yield Bundle.of(run)
            run, size = [], 0
        run.append(group)
        size, dtype = size + nbytes, own
    if run:
        yield Bundle.of(run)


def _stretches(offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of stretches that follow each other without a gap."""
    for begin, end in _runs(offsets, sizes):
        yield int(offsets[begin]), int(sizes[begin:end].sum())


def _joined(offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], data: ByteArray) -> Iterator[Piece]:
    """Yield pieces of `data`, which holds what belongs at each offset one behind the other."""
    start = 0
    for begin, end in _runs(offsets, sizes):
        size = int(sizes[begin:end].sum())
        yield Piece(int(offsets[begin]), data[start : start + size].data)
        start += size


def _runs(offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield index ranges in which each stretch begins where the one before it ends."""
    breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + sizes[:-1]) + 1
    edges = [0, *breaks.tolist(), len(offsets)]
    yield from itertools.pairwise(edges)
