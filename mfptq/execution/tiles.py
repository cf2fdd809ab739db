"""How the work on a shard is cut: into fused groups, and weights into tiles of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from ..checkpoint.weights import Weight
from ..dtypes import DTYPE_BITS
from ..names.fusion import by_group
from ..nvfp4 import BLOCK_SIZE
from ..planning.jobs import QuantizeWeight


@dataclass(frozen=True, slots=True)
class Tile:
    """A contiguous part of a weight: `rows` whole rows, or, of a row too long for a tile, `columns` of it.

    `start` is the index of its first element in the weight.
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
        """Size in the source, in bytes."""
        return self.size * DTYPE_BITS[self.weight.dtype] // 8

    @property
    def offset(self) -> int:
        """Where the tile begins in the source file, in bytes."""
        return self.weight.offset + self.start * DTYPE_BITS[self.weight.dtype] // 8


def tiles(weight: Weight, tile_bytes: int) -> Iterator[Tile]:
    """Yield the weight in tiles of at most `tile_bytes`, which must hold one group of 16."""
    elements = tile_bytes * 8 // DTYPE_BITS[weight.dtype]
    step = elements // weight.columns
    if step:
        for row in range(0, weight.rows, step):
            yield Tile(weight, row * weight.columns, min(step, weight.rows - row), weight.columns)
        return
    width = elements // BLOCK_SIZE * BLOCK_SIZE
    for row in range(weight.rows):
        for column in range(0, weight.columns, width):
            yield Tile(weight, row * weight.columns + column, 1, min(width, weight.columns - column))


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
        """Whether its weights have one dtype."""
        return len(self.weights) == 1 or len({step.weight.dtype for step in self.weights}) == 1


def group_steps(weights: Iterable[QuantizeWeight]) -> list[GroupStep]:
    """Return a shard's weights by fused group, in the order in which their data begins."""
    return [GroupStep(name, tuple(steps)) for name, steps in by_group(weights, attrgetter("group")).items()]
