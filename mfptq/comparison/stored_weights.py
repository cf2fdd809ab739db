"""Compare weights of an output with the source they were made from, part by part: how far off, and is it still that source?

Called by `parallel`, on all cores; `observation.quantized` decodes weights by it. Every function reads two files and writes none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .. import fp8
from ..checkpoint.encoding import Region
from ..checkpoint.source import Source
from ..checkpoint.stored_bytes import read_bytes, read_float32, read_scalar
from ..checkpoint.weights import StoredTensor, Weight
from ..dtypes import NUMPY_DTYPES
from ..encodings.codes import E2M1
from ..encodings.scaled import ScaledCodes
from ..execution.strips import Strip
from ..execution.tiles import Tile, tiles
from ..execution.transposed import read_transposed
from ..kernels import ErrorStats
from ..kernels.decode import load_decoder
from ..nvfp4 import BLOCK_SIZE, E4M3_VALUES, Float32Array, as_float32
from ..planning.formats import GLOBAL_SCALE, PACKED, SCALE, WEIGHT, TargetFormat
from ..planning.stored_codes import takes_codes

TILE_BYTES = 2**20  # what a thread looks at at once: it and its copies stay in the processor's cache
PART_BYTES = 32 * 2**20  # of one piece of work: enough of them for all cores, not too many to list

AfterTile = Callable[[str, list[tuple[int, int]]], object]  # told the source's file, and what ranges of it were read


class Comparison(NamedTuple):
    """What a part has turned out to be: whether what must be equal is, and what quantizing did to it."""

    same: bool
    stats: ErrorStats


class Part(Protocol):
    """Some of an output, small enough to be one thread's, and where in the source lies what it was made from."""

    @property
    def shard(self) -> str:
        """The source's file."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Where in it, (offset, size) in bytes; scales may lie elsewhere, and matrices stored transposed do."""

    def compare(self, original: Source, after_tile: AfterTile) -> Comparison:
        """Read both and compare."""


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight as an output holds it: its tensors by suffix, in the files of `source`."""

    weight: Weight
    format: TargetFormat
    parts: Mapping[str, StoredTensor]
    source: Source

    @cached_property
    def scales(self) -> Float32Array:
        """The scales of FP8, `[rows, columns]` of segments; one for a whole tensor."""
        return read_float32(self.source, self.parts[SCALE]).reshape(self.format.grid(self.weight))

    def decode(self, tile: Tile) -> Float32Array:
        """Return the float32 values of a tile, flat."""
        return _DECODERS[self.format.family](self, tile)

    def split(self) -> Iterator[WeightPart]:
        """Yield the weight in parts."""
        kind = CarriedPart if self.is_carried else WeightPart
        for rows in _runs(self.weight):
            yield kind(self, rows)

    @property
    def is_carried(self) -> bool:
        """Whether its codes are those of the source, since they were FP8 of this very kind."""
        return self.format.family == "fp8" and takes_codes(self.format, self.weight)


@dataclass(frozen=True)
class WeightPart:
    """Some rows of a quantized weight."""

    stored: StoredWeight
    rows: range

    @property
    def shard(self) -> str:
        """The source's file."""
        return self.stored.weight.shard

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Where in it the rows lie."""
        columns = self.stored.weight.columns
        return Tile(self.stored.weight, self.rows.start * columns, len(self.rows), columns).ranges

    def compare(self, original: Source, after_tile: AfterTile) -> Comparison:
        """Find the squared error, the squared norm of what the rows were made from, and its checksum."""
        weight, total = self.stored.weight, ErrorStats()
        for tile in tiles(weight, TILE_BYTES, self.rows):
            values = read_values(original, tile)
            exact = as_float32(values)
            difference = self.stored.decode(tile)
            difference -= exact
            total.add(ErrorStats(tile.size, _squares(difference), _squares(exact), checksum=tile.checksum(values)))
            after_tile(weight.shard, tile.ranges)
        return Comparison(same=True, stats=total)


class CarriedPart(WeightPart):
    """Some rows of a weight whose codes and scales went over as they are."""

    def compare(self, original: Source, after_tile: AfterTile) -> Comparison:
        """Look whether both files hold the same codes and scales, and find the codes' checksum."""
        stored, total = self.stored, ErrorStats()
        encoding = stored.weight.encoding
        assert isinstance(encoding, ScaledCodes)
        same = self.rows.start > 0 or self._same_scales(encoding, original)
        for tile in tiles(stored.weight, TILE_BYTES, self.rows):
            codes = np.empty(tile.size, np.uint8)
            encoding.read_codes(original, tile.region, codes)
            same = same and np.array_equal(
                codes, read_bytes(stored.source, stored.parts[WEIGHT], tile.start, tile.size)
            )
            total.add(ErrorStats(tile.size, checksum=tile.checksum(codes)))
            after_tile(stored.weight.shard, tile.ranges)
        return Comparison(same, total)

    def _same_scales(self, encoding: ScaledCodes, original: Source) -> bool:
        weight, (height, width) = self.stored.weight, self.stored.format.segment
        region = Region(0, weight.rows, 0, weight.columns)
        exact = encoding.segment_scales(original, region, (height, width or weight.columns))
        return np.array_equal(exact, self.stored.scales)


@dataclass(frozen=True)
class KeptPart:
    """Some bytes of a tensor that is kept, or, of one that is decoded, some rows; `second` is what became of `first`."""

    first: StoredTensor
    second: StoredTensor
    output: Source
    span: range

    @property
    def shard(self) -> str:
        """The source's file."""
        return self.first.shard

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Where in it the bytes, or the rows' codes, lie."""
        if self.first.encoding is None:
            return [(self.first.offset + self.span.start, len(self.span))]
        columns = self.first.matrix.columns
        return Tile(self.first.matrix, self.span.start * columns, len(self.span), columns).ranges

    def compare(self, original: Source, after_tile: AfterTile) -> Comparison:
        """Look whether both files hold the same."""
        look = self._same_bytes if self.first.encoding is None else self._same_values
        return Comparison(look(original, after_tile), ErrorStats())

    def _same_bytes(self, original: Source, after_tile: AfterTile) -> bool:
        same = True
        for start in self.span[::TILE_BYTES]:
            size = min(TILE_BYTES, self.span.stop - start)
            one, other = (
                read_bytes(source, tensor, start, size)
                for source, tensor in ((original, self.first), (self.output, self.second))
            )
            same = same and np.array_equal(one, other)
            after_tile(self.first.shard, [(self.first.offset + start, size)])
        return same

    def _same_values(self, original: Source, after_tile: AfterTile) -> bool:
        same = True
        for tile in tiles(self.first.matrix, TILE_BYTES, self.span):
            other = replace(tile, weight=self.second.matrix)
            same = same and np.array_equal(read_values(original, tile), read_values(self.output, other))
            after_tile(self.first.shard, tile.ranges)
        return same


def kept_parts(first: StoredTensor, second: StoredTensor, output: Source) -> Iterator[KeptPart]:
    """Yield a kept tensor in parts of about PART_BYTES."""
    size = first.info.nbytes
    spans = (range(start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES))
    for span in spans if first.encoding is None else _runs(first.matrix):
        yield KeptPart(first, second, output, span)


def _runs(weight: Weight) -> Iterator[range]:
    """Yield all rows of a matrix, about PART_BYTES at a time."""
    step = max(1, PART_BYTES * weight.rows // max(1, weight.nbytes))
    for start in range(0, weight.rows, step):
        yield range(start, min(start + step, weight.rows))


def read_values(source: Source, tile: Tile) -> npt.NDArray[Any]:
    """Return a tile's values, flat, decoded where it is stored as codes; bfloat16 as its bits."""
    raw = np.empty(tile.nbytes, np.uint8)
    values: npt.NDArray[Any] = raw.view(NUMPY_DTYPES[tile.weight.dtype])
    if tile.weight.pitch:
        read_transposed(source, tile, values, np.empty(TILE_BYTES // 4, np.uint8))
    elif tile.weight.encoding is None:
        source.read_into(tile.weight.shard, tile.offset, raw.data)
    else:
        tile.weight.encoding.decode(source, tile.region, values, load_decoder())
    return values


def _squares(values: Float32Array) -> float:
    wide = values.astype(np.float64)  # squares of large weights are no float32
    return float(np.dot(wide, wide))


def _nvfp4(stored: StoredWeight, tile: Tile) -> Float32Array:
    source, parts = stored.source, stored.parts
    packed = read_bytes(source, parts[PACKED], tile.start // 2, tile.size // 2)
    codes = read_bytes(source, parts[SCALE], tile.start // BLOCK_SIZE, tile.size // BLOCK_SIZE)
    scales = E4M3_VALUES[codes] / np.float32(read_scalar(source, parts[GLOBAL_SCALE]))
    found = np.empty((tile.rows, tile.columns), np.float32)
    load_decoder()(E2M1, packed, scales.reshape(tile.rows, -1), found, run=BLOCK_SIZE)
    return found.reshape(-1)


def _fp8(stored: StoredWeight, tile: Tile) -> Float32Array:
    codes = read_bytes(stored.source, stored.parts[WEIGHT], tile.start, tile.size).reshape(tile.rows, -1)
    weight, (height, width) = stored.weight, stored.format.segment
    places = Strip(weight, (height or weight.rows, width or weight.columns), 0, weight.rows, ()).parts(tile)
    widths = np.diff(places.starts[: len(places.columns) + 1])
    scales = np.repeat(stored.scales[np.ix_(places.rows, places.columns)], widths, axis=1)
    return fp8.dequantize(codes, scales).reshape(-1)


_DECODERS: Mapping[str, Callable[[StoredWeight, Tile], Float32Array]] = {"nvfp4": _nvfp4, "fp8": _fp8}
