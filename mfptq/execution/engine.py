"""Convert a plan's shards on worker threads. Nothing here decides: the plan has decided.

A supply yields the tasks of one shard after the other, and few supplies share all shards. A worker reads a tile, quantizes it, hashes and writes the
result, in one function from top to bottom; whoever ends a shard's last task completes the shard. A fused group larger than
a tile is read twice: its largest magnitude first, then its bytes, the second time from the page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.reads import ReadAhead
from ..errors import NonFiniteWeightError
from ..fp8 import Candidates, stored_scales
from ..kernels import WeightBatch
from ..nvfp4 import Float32Array
from ..output.destination import Destination
from ..output.shard_writer import ShardWriter
from ..planning.jobs import CAST, CopyRun, QuantizeWeight, ShardPlan, WidenTensor, copy_runs, largest_first, stats_key
from ..storage.partial_file import Piece
from .carried_codes import carried, carried_scales, mapped_scales, read_codes
from .events import Advanced, Event, OnEvent, Planned, ShardFinished, ignore
from .families import Family, TileWork, convert_tile, family_of
from .global_scales import AmaxSearch, GlobalScales, global_scale, scalar
from .memory_budget import exceeds_half_of_memory
from .reading_order import reading_order, shards_at_once, work_order
from .strips import Strip, strip_scales, strips
from .tiles import Batch, GroupStep, Tile, batches, tiles
from .turned import amax_tiles
from .worker_memory import WorkerMemory
from .worker_pool import POLL_SECONDS, Task, WorkerPool

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan

MemoryTask = Task[WorkerMemory]
Ranges = Iterable[tuple[int, int]]
WeightTile = tuple[QuantizeWeight, Tile]
Way = Callable[[ShardWriter, Iterable[GroupStep]], Iterator[MemoryTask]]


class Execution:
    """One run of a plan into a destination; `run` returns when every shard is durable.

    Threads: all methods but `run` run on workers. `_open` is filled by whoever asks the supply, one at a time.
    """

    def __init__(self, plan: ConversionPlan, destination: Destination, memories: Sequence[WorkerMemory]) -> None:
        self._plan = plan
        self._source = plan.checkpoint.source
        self._destination = destination
        self._tile_bytes = memories[0].tile_bytes
        self._scales = GlobalScales()
        self._open: dict[str, ShardWriter] = {}
        self._forget = exceeds_half_of_memory(plan.checkpoint.tensor_bytes + plan.tensor_bytes)
        self._drop = self._forget or self._source.is_remote
        shards = iter(largest_first(plan.shards))
        lines = shards_at_once(len(memories), one_by_one=self._source.is_remote or destination.one_by_one)
        self._pool = WorkerPool([self._tasks(shards) for _ in range(lines)], memories)

    def run(self, on_event: OnEvent, *, held_bytes: int = 0) -> None:
        """Do all the work that is not done yet; raise the first error, leaving no temporary behind.

        `held_bytes` is how much a remote source may hold in memory.
        """
        shards = [self._plan.checkpoint.shard(shard.name) for shard in self._plan.shards]
        on_event(Planned(sum(shard.header.data_bytes for shard in shards)))
        order = reading_order(self._plan, set(self._destination.done), held_bytes)
        self._source.read_ahead(ReadAhead(order, held_bytes, digests=True))

        def watched(event: Event) -> None:
            try:
                on_event(event)
            except BaseException:
                self._source.stop()  # no worker waits for a network while the run ends
                raise

        self._pool.emit(Advanced(self._plan.contents.scale_bytes))
        try:
            self._pool.run(watched)
        finally:
            for writer in self._open.values():
                writer.discard()

    def _tasks(self, shards: Iterator[ShardPlan]) -> Iterator[MemoryTask]:
        """Yield the tasks of one shard after the other; a shard is taken and opened when its first task is asked for."""
        for shard in shards:
            if shard.name in self._destination.done:
                self._pool.emit(Advanced(self._plan.contents.stored_bytes(shard.name)))
                self._pool.emit(ShardFinished(shard.name, resumed=True))
                continue
            self._destination.before_shard()
            job = self._plan.job(shard)
            writer = ShardWriter(job, self._destination.create(job.name, job.size))
            self._open[job.name] = writer
            writer.expect(1)  # so that the shard is not complete before its last task is handed out
            for task in self._shard_tasks(writer):
                writer.expect(1)
                yield partial(self._carry_out, writer, task)
            yield partial(self._carry_out, writer, ignore)

    def _carry_out(self, writer: ShardWriter, task: MemoryTask, memory: WorkerMemory) -> None:
        """Run one task of a shard; after the last, make the shard durable under its name."""
        task(memory)
        if not writer.finish_task():
            return
        name = writer.job.name
        self._plan.check_unchanged(name)
        with memory.timed("complete"):
            result = writer.complete(memory.bytes, forget=self._forget)
        if self._drop:
            self._source.drop_cached(name, 0, 0)  # what tiles that end inside of the kernel's pages have left
        self._destination.record(result)
        del self._open[name]
        self._pool.emit(ShardFinished(name))

    def _shard_tasks(self, writer: ShardWriter) -> Iterator[MemoryTask]:
        if writer.job.scalars:
            yield partial(self._write_scalars, writer)
        for work in work_order(writer.job, by_source=self._source.is_remote):
            yield from (partial(self._copy, writer, run) for run in copy_runs(work.copies, self._tile_bytes))
            for kept in work.widened:
                yield from (partial(self._widen, writer, kept, tile) for tile in tiles(kept.weight, self._tile_bytes))
            for way, steps in groupby(work.groups, self._way):
                yield from way(writer, steps)

    def _way(self, step: GroupStep) -> Way:
        """Return how a group is converted: in strips, in a batch with others, or after its largest magnitude is known."""
        if not step.weights[0].format.by_group:
            return self._strips
        return self._batches if _family(step.weights[0]).batched and self._is_small(step) else self._groups

    def _batches(self, writer: ShardWriter, steps: Iterable[GroupStep]) -> Iterator[MemoryTask]:
        for batch in batches(steps, self._tile_bytes):
            yield partial(self._convert_batch, writer, batch)

    def _groups(self, writer: ShardWriter, steps: Iterable[GroupStep]) -> Iterator[MemoryTask]:
        for step in steps:
            yield partial(self._find_scale, writer, step)
            while self._source.is_remote and self._scales.is_searching:  # what is held of one group is much already
                yield self._await_scale

    def _strips(self, writer: ShardWriter, steps: Iterable[GroupStep]) -> Iterator[MemoryTask]:
        for step in (each for group in steps for each in group.weights):
            convert = self._carry_strip if step.method == CAST else self._convert_strip
            for strip in strips(step.weight, step.format.segment, self._tile_bytes):
                yield partial(convert, writer, (step, strip))

    def _is_small(self, step: GroupStep) -> bool:
        """Return whether a group is read once, with others: it fits into a tile, has one dtype, and lies in one shard."""
        members = self._plan.group_of(step.weights[0].weight).members
        return step.nbytes <= self._tile_bytes and step.is_uniform and len(step.weights) == len(members)

    def _copy(self, writer: ShardWriter, run: CopyRun, memory: WorkerMemory) -> None:
        with memory.timed("copy"):
            data = memory.read_bytes(self._source, run.shard or writer.job.name, run.ranges)
            if run.table is not None:
                data[:] = mapped_scales(run, bytes(data), writer.job.copies)
        self._write(writer, [Piece(run.offset, data)], run.ranges, memory)

    def _write_scalars(self, writer: ShardWriter, memory: WorkerMemory) -> None:
        self._write(writer, [Piece(each.offset, scalar(each.value)) for each in writer.job.scalars], (), memory)

    def _widen(self, writer: ShardWriter, kept: WidenTensor, tile: Tile, memory: WorkerMemory) -> None:
        values = memory.widen(self._source, tile)
        width = values.itemsize
        self._write(writer, [Piece(kept.offset + tile.start * width, values.view(np.uint8).data)], tile.ranges, memory)

    def _convert_batch(self, writer: ShardWriter, batch: Batch, memory: WorkerMemory) -> None:
        """Convert whole groups that fit into the memory together: read once, written in as few runs as they lie in."""
        data = memory.read_batch(self._source, batch)
        amax = batch.of_groups(memory.amax_each(data, batch))
        checksums = memory.checksums(batch, data)
        method = self._plan.method
        scales = batch.for_weights([global_scale(method, found, batch.dtype) for found in amax.tolist()])
        if self._plan.calibration is None:
            quantized = memory.quantize_each(data, WeightBatch(method, batch.starts, scales))
        else:
            quantized = memory.quantize_by(self._plan.statistics, data, batch, scales)
        for pattern, stats in batch.by_pattern(quantized.stats, checksums).items():
            writer.note(pattern, stats)
        pieces = batch.pieces(quantized.packed, quantized.scales, scales)
        self._write(writer, pieces, batch.reads, memory, keep=batch.is_turned)

    def _find_scale(self, writer: ShardWriter, step: GroupStep, _memory: WorkerMemory) -> None:
        """Find the largest magnitude over all members, wherever they lie; then quantize those of this shard."""
        members = self._plan.members(step.weights[0].weight)
        found = list(amax_tiles(members, self._tile_bytes))
        work = [(each, tile) for each in step.weights for tile in _family(each).tiles(each, self._tile_bytes)]
        writer.expect(len(work))
        waiter = partial(self._quantize_group, writer, work)
        rule = partial(_family(step.weights[0]).scale, self._plan.method)
        if self._scales.begin(step.name, AmaxSearch(members, len(found), rule), waiter):
            self._pool.add(partial(self._find_amax, step, tile) for tile in found)

    def _await_scale(self, _memory: WorkerMemory) -> None:
        self._scales.wait(POLL_SECONDS)

    def _find_amax(self, step: GroupStep, tile: Tile, memory: WorkerMemory) -> None:
        try:
            found = _family(step.weights[0]).amax(memory, self._source, tile)
        except NonFiniteWeightError:
            for weight in self._plan.members(step.weights[0].weight) if step.is_turned else ():
                for part in tiles(weight, self._tile_bytes):  # a tile of what is stored says neither which nor where
                    memory.amax(self._source, part)
            raise
        self._scales.found(step.name, found)

    def _quantize_group(self, writer: ShardWriter, work: Iterable[WeightTile], scale: float) -> None:
        tasks = [partial(self._quantize_tile, writer, each, scale) for each in work]
        self._pool.add(partial(self._carry_out, writer, task) for task in tasks)

    def _quantize_tile(self, writer: ShardWriter, work: WeightTile, scale: float, memory: WorkerMemory) -> None:
        step, tile = work
        pieces, stats = convert_tile(memory, step, tile, partial(self._read, step, scale))
        writer.note(stats_key(step), stats)
        self._write(writer, pieces, tile.ranges, memory, keep=tile.weight.pitch > 0)

    def _read(self, step: QuantizeWeight, scale: float, memory: WorkerMemory, tile: Tile) -> TileWork:
        data, found = memory.read(self._source, tile), self._plan.statistics(step)
        known = None if found is None else found.part(tile.start % step.weight.columns, tile.columns)
        return TileWork(step, tile, data, scale, self._source, known, memory.checksum(tile, data))

    def _convert_strip(self, writer: ShardWriter, work: tuple[QuantizeWeight, Strip], memory: WorkerMemory) -> None:
        """Convert rows that share no scale with others: one that fits into the memory is read once, else twice."""
        step, strip = work
        amax, data = np.zeros(strip.shape, np.float32), None
        for tile in strip.tiles:
            data, parts = memory.read(self._source, tile), strip.parts(tile)
            parts.merge(amax, memory.amax_segments(data, parts.starts, tile))
        scales, chosen = strip_scales(step, amax), np.empty(strip.shape, np.float32)
        if scales.by_block:
            candidates = Candidates.of(scales.scales, scales.others)
            for tile in strip.tiles:
                data = memory.read(self._source, tile) if data is None or len(strip.tiles) > 1 else data
                parts = strip.parts(tile)
                memory.add_errors(data, parts.starts, parts.places, candidates)
            scales = scales.settled(candidates)
        for tile in strip.tiles:
            data = memory.read(self._source, tile) if data is None or len(strip.tiles) > 1 else data
            parts = strip.parts(tile)
            checksum = memory.checksum(tile, data)  # before the codes take the place of the values
            done = memory.quantize_segments(data, scales.segments(parts))
            done.stats.checksum = checksum
            parts.put(chosen, done.scales)
            writer.note(stats_key(step), done.stats)
            piece = Piece(step.values + tile.start, done.codes.data)
            self._write(writer, [piece], tile.ranges, memory, keep=tile.weight.pitch > 0)
        self._write_scales(writer, work, chosen, memory)

    def _carry_strip(self, writer: ShardWriter, work: tuple[QuantizeWeight, Strip], memory: WorkerMemory) -> None:
        """Take over rows whose codes are those of their format already."""
        step, strip = work
        scales = carried_scales(self._source, strip)
        for tile in strip.tiles:
            codes, parts = np.frombuffer(memory.bytes, np.uint8)[: tile.size], strip.parts(tile)
            with memory.timed("read"):
                read_codes(self._source, tile, codes)
            with memory.timed("copy"):
                writer.note(stats_key(step), carried(tile, codes, parts, parts.of(scales)))
            self._write(writer, [Piece(step.values + tile.start, codes.data)], tile.ranges, memory)
        self._write_scales(writer, work, scales, memory)

    def _write_scales(
        self, writer: ShardWriter, work: tuple[QuantizeWeight, Strip], scales: Float32Array, memory: WorkerMemory
    ) -> None:
        """Write the scales of a strip's segments."""
        step, strip = work
        stored = stored_scales(scales, step.format.scale_dtype(step.weight, step.method))
        size = len(stored) // scales.size
        self._write(writer, [Piece(step.scale + strip.scale_index * size, stored)], (), memory)

    def _write(
        self, writer: ShardWriter, pieces: Iterable[Piece], reads: Ranges, memory: WorkerMemory, *, keep: bool = False
    ) -> None:
        """Hash and write what the ranges `reads` of the source, (offset, size) in bytes, have become.

        `keep`: other tiles lie in the same pages, which stay in the page cache until the shard is complete.
        """
        with memory.timed("write"):
            writer.write(pieces, memory.bytes)
        for offset, size in reads:
            if self._drop and not keep:
                self._source.drop_cached(writer.job.name, offset, size)
            self._pool.emit(Advanced(size))


def _family(step: QuantizeWeight) -> Family:
    return family_of(step.format, step.method)
