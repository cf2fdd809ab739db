"""Cut the work on a shard: large weights into tiles of bounded size, many small fused groups into one batch.

Called by `execution.engine` and `execution.conversions`; `comparison` and `observation` read by tiles too. Nothing here
reads. A model with a hundred thousand small experts must not cost a hundred thousand times what one tensor costs beyond its
bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from ..checkpoint.encoding import Region
from ..checkpoint.weights import Weight
from ..dtypes import DTYPE_BITS
from ..kernels import ErrorStats, Float64Array, Int64Array, TileArray
from ..names.fusion import by_group
from ..nvfp4 import BLOCK_SIZE, ByteArray, Float32Array
from ..planning.jobs import QuantizeWeight, stats_key
from ..storage.checksum import MODULUS, checksum, checksum_of_columns
from ..storage.partial_file import Piece


@dataclass(frozen=True, slots=True)
class Tile:
    """A contiguous part of a weight: `rows` whole rows, or, of a row too long for a tile, `columns` of it.

    `start` is the index of its first element in the weight. A part of a tall tile is not contiguous: `columns` of several rows.
    """

    weight: Weight
    start: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """Size of its values, in bytes."""
        return self.size * DTYPE_BITS[self.weight.dtype] // 8

    @property
    def region(self) -> Region:
        """Its rows and columns in the weight."""
        row, column = divmod(self.start, self.weight.columns)
        return Region(row, self.rows, column, self.columns)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Where it lies in the source file, (offset, size) in bytes; of an encoded weight, where its codes lie."""
        encoding = self.weight.encoding
        return [(self.offset, self.nbytes)] if encoding is None else encoding.ranges(self.region)

    def checksum(self, values: TileArray) -> int:
        """Return what the tile's values add to the checksum of its weight."""
        place = self.weight.module, self.start * values.itemsize
        if self.rows > 1 and self.columns < self.weight.columns:
            return checksum_of_columns(*place, values.reshape(self.rows, -1), self.weight.columns * values.itemsize)
        return checksum(*place, values)

    @property
    def offset(self) -> int:
        """Where the tile begins in the source file, in bytes."""
        return self.weight.offset + self.start * DTYPE_BITS[self.weight.dtype] // 8


def stored_end(weight: Weight) -> int:
    """Return where a matrix ends in its file, in bytes."""
    if not weight.pitch:
        return weight.offset + weight.nbytes
    width = DTYPE_BITS[weight.dtype] // 8
    return weight.offset + int(((weight.columns - 1) * weight.pitch + weight.rows) * width)


def tiles(weight: Weight, tile_bytes: int, rows: range | None = None) -> Iterator[Tile]:
    """Yield the weight, or some of its rows, in tiles of at most `tile_bytes`, which must hold one block of 16."""
    rows = range(weight.rows) if rows is None else rows
    elements = tile_bytes * 8 // DTYPE_BITS[weight.dtype]
    step = elements // weight.columns
    if step:
        for row in rows[::step]:
            yield Tile(weight, row * weight.columns, min(step, rows.stop - row), weight.columns)
        return
    width = elements // BLOCK_SIZE * BLOCK_SIZE
    for row in rows:
        for column in range(0, weight.columns, width):
            yield Tile(weight, row * weight.columns + column, 1, min(width, weight.columns - column))


def whole(weight: Weight) -> Tile:
    """Return a weight as one tile."""
    return Tile(weight, 0, weight.rows, weight.columns)


@dataclass(frozen=True, slots=True)
class GroupStep:
    """The weights of one fused group that lie in one shard."""

    name: str
    weights: tuple[QuantizeWeight, ...]

    @property
    def nbytes(self) -> int:
        """Size in the source, in bytes."""
        return sum(step.weight.nbytes for step in self.weights)

    @property
    def is_uniform(self) -> bool:
        """Whether its weights have one dtype, and are stored alike."""
        return len({(step.weight.dtype, step.weight.pitch > 0) for step in self.weights}) == 1

    @property
    def is_transposed(self) -> bool:
        """Whether any of its weights is stored transposed."""
        return any(step.weight.pitch for step in self.weights)


def group_steps(weights: Iterable[QuantizeWeight]) -> list[GroupStep]:
    """Return a shard's weights by fused group, in the order in which their data begins."""
    return [GroupStep(name, tuple(steps)) for name, steps in by_group(weights, attrgetter("group")).items()]


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole small groups of one shard and dtype, read at once: weight i has elements `starts[i]` to `starts[i + 1]`.

    `reads` are the ranges of the source file, (offset, size) in bytes, in which the weights lie, in their order. Weights that
    are stored transposed are read one by one, and `reads` has only their sizes; so are all where any of them is `encoded`.
    """

    groups: tuple[GroupStep, ...]
    steps: tuple[QuantizeWeight, ...]
    starts: Int64Array
    reads: tuple[tuple[int, int], ...]
    encoded: bool = False

    @classmethod
    def of(cls, groups: Sequence[GroupStep]) -> Batch:
        """Return the batch of some groups."""
        steps = tuple(step for group in groups for step in group.weights)
        sizes = [step.weight.size for step in steps]
        offsets = np.array([step.weight.offset for step in steps])
        nbytes = np.array(sizes) * (DTYPE_BITS[steps[0].weight.dtype] // 8)
        starts = np.cumsum([0, *sizes], dtype=np.int64)
        if any(step.weight.encoding is not None for step in steps):
            codes = [each for step in steps for each in whole(step.weight).ranges]
            return cls(tuple(groups), steps, starts, tuple(codes), encoded=True)
        reads = [(int(offsets[begin]), int(nbytes[begin:end].sum())) for begin, end in _runs(offsets, nbytes)]
        return cls(tuple(groups), steps, starts, tuple(reads))

    @property
    def is_transposed(self) -> bool:
        """Whether its weights are stored transposed."""
        return bool(self.steps[0].weight.pitch)

    @property
    def dtype(self) -> str:
        """The dtype of all its weights."""
        return self.steps[0].weight.dtype

    def of_groups(self, amax: Float32Array) -> Float32Array:
        """Return each group's largest magnitude, of one for each weight."""
        first = np.cumsum([0, *(len(group.weights) for group in self.groups[:-1])])
        return np.maximum.reduceat(amax, first)

    def for_weights(self, scales: Sequence[float]) -> Float32Array:
        """Return each weight's global scale, of one for each group."""
        return np.repeat(np.array(scales, np.float32), [len(group.weights) for group in self.groups])

    def pieces(self, packed: ByteArray, scales: ByteArray, global_scales: Float32Array) -> Iterator[Piece]:
        """Yield what is to be written, neighbours together."""
        sizes = np.diff(self.starts)
        yield from _joined(np.array([step.values for step in self.steps]), sizes // 2, packed)
        yield from _joined(np.array([step.scale for step in self.steps]), sizes // BLOCK_SIZE, scales)
        places, values = [step.global_scale for step in self.steps], global_scales
        inputs = [step.input_scale for step in self.steps if step.input_scale is not None]
        if inputs:
            places = [*places, *(each.offset for each in inputs)]
            values = np.concatenate([values, np.array([each.value for each in inputs], np.float32)])
        order = np.argsort(places)
        stored = np.ascontiguousarray(values[order].astype("<f4")).view(np.uint8)
        yield from _joined(np.array(places)[order], np.full(len(places), 4), stored)

    def checksums(self, data: TileArray) -> list[int]:
        """Return the checksum of each weight's values, which lie in `data` one weight behind the other."""
        ends = self.starts.tolist()
        return [
            checksum(step.weight.module, 0, data[begin:end])
            for step, (begin, end) in zip(self.steps, itertools.pairwise(ends), strict=True)
        ]

    def by_pattern(self, stats: Float64Array, checksums: Sequence[int]) -> dict[str, ErrorStats]:
        """Return the statistics of the weights, `[n, 7]`, those of one layer whose names have one pattern together."""
        rows: dict[str, list[int]] = {}
        for row, step in enumerate(self.steps):
            rows.setdefault(stats_key(step), []).append(row)
        sizes = np.diff(self.starts)
        together = {pattern: ErrorStats.together(int(sizes[each].sum()), stats[each]) for pattern, each in rows.items()}
        for pattern, found in together.items():
            found.checksum = sum(checksums[row] for row in rows[pattern]) % MODULUS
        return together


def batches(groups: Iterable[GroupStep], tile_bytes: int) -> Iterator[Batch]:
    """Yield runs of groups of one dtype, stored alike, that together fit into one tile."""
    run: list[GroupStep] = []
    size, kind = 0, ("", False)
    for group in groups:
        nbytes, own = group.nbytes, (group.weights[0].weight.dtype, group.is_transposed)
        if run and (size + nbytes > tile_bytes or own != kind):
            yield Batch.of(run)
            run, size = [], 0
        run.append(group)
        size, kind = size + nbytes, own
    if run:
        yield Batch.of(run)


def _joined(offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], data: ByteArray) -> Iterator[Piece]:
    """Yield pieces of `data`, which holds what belongs at each offset one behind the other."""
    start = 0
    for begin, end in _runs(offsets, sizes):
        size = int(sizes[begin:end].sum())
        yield Piece(int(offsets[begin]), data[start : start + size].data)
        start += size


def _runs(offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield index ranges in which each range of bytes begins where the one before it ends."""
    breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + sizes[:-1]) + 1
    yield from itertools.pairwise([0, *breaks.tolist(), len(offsets)])
