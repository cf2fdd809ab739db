"""Make each part of an output file on a worker: read, quantize, and say which bytes belong where.

Called by `execution.engine`, which writes what is yielded before it asks for more. Nothing here writes, or knows of other
workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..fp8 import Candidates, stored_scales
from ..kernels import ErrorStats, QuantizeArgs, TileArray, WeightBatch
from ..kernels.calibrated import PreparedStatistics
from ..nvfp4 import BLOCK_SIZE, Float32Array
from ..planning.jobs import CopyRun, QuantizeWeight, ShardJob, WidenTensor, stats_key
from ..storage.partial_file import Piece
from .carried_codes import carried, carried_scales, mapped_scales, read_codes
from .families import GroupTile, family_of, nvfp4_pieces
from .global_scales import global_scale, scalar
from .strips import Parts, Strip, strip_scales
from .tall_tiles import column_parts
from .tiles import Batch, Tile

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan
    from .worker_memory import WorkerMemory


class Converted(NamedTuple):
    """Pieces of an output file, in the worker's memory until the next ones are asked for.

    `reads` are the source's ranges, (offset, size) in bytes, that they were made from, `stats` what quantizing did, by
    `stats_key`. `shares_pages`: other parts lie among them in the source, in the same pages of the page cache.
    """

    pieces: Iterable[Piece]
    reads: Iterable[tuple[int, int]] = ()
    stats: Iterable[tuple[str, ErrorStats]] = ()
    shares_pages: bool = False


Conversion = Callable[["WorkerMemory"], Iterator[Converted]]


def write_scalars(job: ShardJob, _memory: WorkerMemory) -> Iterator[Converted]:
    """Yield the numbers that the plan knows."""
    yield Converted([Piece(each.offset, scalar(each.value)) for each in job.scalars])


def copy_run(job: ShardJob, run: CopyRun, memory: WorkerMemory) -> Iterator[Converted]:
    """Yield bytes that go over; block scales by way of their table."""
    with memory.timed("copy"):
        data = memory.read_bytes(run.shard or job.name, run.ranges)
        if run.table is not None:
            data[:] = mapped_scales(run, bytes(data), job.copies)
    yield Converted([Piece(run.offset, data)], run.ranges)


def widen_tile(kept: WidenTensor, tile: Tile, memory: WorkerMemory) -> Iterator[Converted]:
    """Yield the values of part of a kept tensor that is stored as codes."""
    values = memory.widen(tile)
    yield Converted([Piece(kept.offset + tile.start * values.itemsize, values.view(np.uint8).data)], tile.ranges)


def convert_batch(plan: ConversionPlan, batch: Batch, memory: WorkerMemory) -> Iterator[Converted]:
    """Convert whole groups that fit into the memory together: read once, written in as few pieces as they lie in."""
    data = memory.read_batch(batch)
    amax = batch.of_groups(memory.amax_each(data, batch))
    checksums = memory.checksums(batch, data)
    scales = batch.for_weights([global_scale(plan.method, found, batch.dtype) for found in amax.tolist()])
    if plan.calibration is None:
        done = memory.quantize_each(data, WeightBatch(plan.method, batch.starts, scales))
    else:
        done = memory.quantize_by(plan.statistics, data, batch, scales)
    pieces = batch.pieces(done.packed, done.scales, scales)
    stats = batch.by_pattern(done.stats, checksums).items()
    yield Converted(pieces, batch.reads, stats, shares_pages=batch.is_transposed)


def convert_tile(plan: ConversionPlan, work: GroupTile, memory: WorkerMemory) -> Iterator[Converted]:
    """Convert a tile of a weight whose group has a scale, in parts where it is too tall for the memory."""
    step, tile, _ = work
    known = plan.statistics(step)
    if tile.nbytes > memory.tile_bytes:
        pieces, stats = _convert_parts(work, known, memory)
    else:
        data = memory.read(tile)
        checksum = memory.checksum(tile, data)
        pieces, stats = family_of(step.format, step.method).convert(memory, work, data, of_columns(known, tile))
        stats.checksum = checksum
    yield Converted(pieces, tile.ranges, [(stats_key(step), stats)], shares_pages=tile.weight.pitch > 0)


def _convert_parts(
    work: GroupTile, known: PreparedStatistics | None, memory: WorkerMemory
) -> tuple[list[Piece], ErrorStats]:
    """Return what a tall tile becomes in NVFP4, and what it cost."""
    tile = work.tile
    memory, codes = memory.for_parts()
    ends = tile.size // 2, tile.size // 2 + tile.size // BLOCK_SIZE
    packed, scales = (each.reshape(tile.rows, -1) for each in np.split(codes, ends)[:2])
    total = ErrorStats()
    for part in column_parts(tile, memory.tile_bytes):
        data = memory.read(part)
        checksum = memory.checksum(part, data)
        done = memory.quantize(data, QuantizeArgs(work.step.method, work.scale, of_columns(known, part)))
        column = part.start - tile.start
        packed[:, column // 2 : (column + part.columns) // 2] = done.packed
        scales[:, column // BLOCK_SIZE : (column + part.columns) // BLOCK_SIZE] = done.scales
        done.stats.checksum = checksum
        total.add(done.stats)
    return nvfp4_pieces(work, packed.reshape(-1), scales.reshape(-1)), total


def of_columns(known: PreparedStatistics | None, tile: Tile) -> PreparedStatistics | None:
    """Return what is known of the inputs of a tile's columns."""
    return None if known is None else known.part(tile.start % tile.weight.columns, tile.columns)


def convert_strip(step: QuantizeWeight, strip: Strip, memory: WorkerMemory) -> Iterator[Converted]:
    """Convert rows that share no scale with others: those that fit into the memory are read once, else twice."""
    held = memory.read(strip.tiles[0]) if len(strip.tiles) == 1 else None
    amax = np.zeros(strip.shape, np.float32)

    def read(tile: Tile) -> tuple[TileArray, Parts]:
        return memory.read(tile) if held is None else held, strip.parts(tile)

    for tile in strip.tiles:
        data, parts = read(tile)
        parts.merge(amax, memory.amax_segments(data, parts.starts, tile))
    scales, chosen = strip_scales(step, amax), np.empty(strip.shape, np.float32)
    if scales.by_block:
        candidates = Candidates.of(scales.scales, scales.others)
        for tile in strip.tiles:
            data, parts = read(tile)
            memory.add_errors(data, parts.starts, parts.places, candidates)
        scales = scales.settled(candidates)
    for tile in strip.tiles:
        data, parts = read(tile)
        checksum = memory.checksum(tile, data)  # before the codes take the place of the values
        done = memory.quantize_segments(data, scales.segments(parts))
        done.stats.checksum = checksum
        parts.put(chosen, done.scales)
        piece = Piece(step.values + tile.start, done.codes.data)
        yield Converted([piece], tile.ranges, [(stats_key(step), done.stats)], shares_pages=tile.weight.pitch > 0)
    yield Converted([_scales(step, strip, chosen)])


def carry_strip(step: QuantizeWeight, strip: Strip, memory: WorkerMemory) -> Iterator[Converted]:
    """Take over rows whose codes are those of their format already."""
    scales = carried_scales(memory.source, strip)
    for tile in strip.tiles:
        codes, parts = np.frombuffer(memory.bytes, np.uint8)[: tile.size], strip.parts(tile)
        with memory.timed("read"):
            read_codes(memory.source, tile, codes)
        with memory.timed("copy"):
            stats = carried(tile, codes, parts, parts.of(scales))
        yield Converted([Piece(step.values + tile.start, codes.data)], tile.ranges, [(stats_key(step), stats)])
    yield Converted([_scales(step, strip, scales)])


def _scales(step: QuantizeWeight, strip: Strip, scales: Float32Array) -> Piece:
    """Return the scales of a strip's segments, as they are stored."""
    stored = stored_scales(scales, step.format.scale_dtype(step.weight, step.method))
    return Piece(step.scale + strip.scale_index * (len(stored) // scales.size), stored)
