"""Convert a plan's shards on worker threads. Nothing here decides: the plan has decided.

Called by `execution.executors` and `execution.partial_run`. A supply yields the tasks of one shard after the other, and few
supplies share all shards. A worker carries a task out from top to bottom: it reads a tile, quantizes it, hashes and writes
the result (`conversions` has what lies between); whoever ends a shard's last task completes the shard. A fused group larger
than a tile is read twice: its largest magnitude first, then its bytes, the second time from the page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from ..checkpoint.reads import ReadAhead
from ..errors import NonFiniteWeightError
from ..output.destination import Destination
from ..output.shard_writer import ShardWriter
from ..planning.jobs import CAST, QuantizeWeight, ShardPlan, copy_runs, largest_first
from .conversions import (
    Conversion,
    carry_strip,
    convert_batch,
    convert_strip,
    convert_tile,
    copy_run,
    widen_tile,
    write_scalars,
)
from .events import Advanced, Event, OnEvent, Planned, ShardFinished, ignore
from .families import Family, GroupTile, family_of
from .global_scales import AmaxSearch, GlobalScales
from .memory_budget import exceeds_half_of_memory
from .reading_order import reading_order, shards_at_once, work_order
from .strips import strips
from .tiles import GroupStep, Tile, batches, tiles
from .transposed import amax_tiles
from .worker_memory import WorkerMemory
from .worker_pool import POLL_SECONDS, Task, WorkerPool

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan

MemoryTask = Task[WorkerMemory]
GroupTasks = Callable[[ShardWriter, Iterable[GroupStep]], Iterator[MemoryTask]]


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
        at_once = shards_at_once(len(memories), one_by_one=self._source.is_remote or destination.one_by_one)
        self._pool = WorkerPool([self._tasks(shards) for _ in range(at_once)], memories)

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
                self._pool.emit(Advanced(self._plan.contents.source_bytes(shard.name)))
                self._pool.emit(ShardFinished(shard.name, resumed=True))
                continue
            self._destination.before_shard()
            job = self._plan.job(shard)
            writer = ShardWriter(job, self._destination.create(job.name, job.size))
            self._open[job.name] = writer
            writer.expect(1)  # so that the shard is not complete before its last task is handed out
            for task in self._shard_tasks(writer):
                writer.expect(1)
                yield partial(self._run_task, writer, task)
            yield partial(self._run_task, writer, ignore)

    def _run_task(self, writer: ShardWriter, task: MemoryTask, memory: WorkerMemory) -> None:
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

    def _convert(self, writer: ShardWriter, conversion: Conversion, memory: WorkerMemory) -> None:
        """Hash and write what a conversion yields, and drop what it has read."""
        for done in conversion(memory):
            for key, stats in done.stats:
                writer.note(key, stats)
            with memory.timed("write"):
                writer.write(done.pieces, memory.bytes)
            for offset, size in done.reads:
                if self._drop and not done.shares_pages:
                    self._source.drop_cached(writer.job.name, offset, size)
                self._pool.emit(Advanced(size))

    def _shard_tasks(self, writer: ShardWriter) -> Iterator[MemoryTask]:
        """Yield the tasks of a shard, in the order of work."""
        job = writer.job
        if job.scalars:
            yield partial(self._convert, writer, partial(write_scalars, job))
        for work in work_order(job, by_source=self._source.is_remote):
            for run in copy_runs(work.copies, self._tile_bytes):
                yield partial(self._convert, writer, partial(copy_run, job, run))
            for kept in work.widened:
                for tile in tiles(kept.weight, self._tile_bytes):
                    yield partial(self._convert, writer, partial(widen_tile, kept, tile))
            for tasks_of, steps in groupby(work.groups, self._group_tasks):
                yield from tasks_of(writer, steps)

    def _group_tasks(self, step: GroupStep) -> GroupTasks:
        """Return what makes a group's tasks: of strips, of batches with other groups, or of tiles once its scale is known."""
        if not step.weights[0].format.by_group:
            return self._strips
        return self._batches if _family(step.weights[0]).batched and self._is_small(step) else self._tiles

    def _is_small(self, step: GroupStep) -> bool:
        """Return whether a group is read once, with others: it fits into a tile, has one dtype, and lies in one shard."""
        members = self._plan.group_of(step.weights[0].weight).members
        return step.nbytes <= self._tile_bytes and step.is_uniform and len(step.weights) == len(members)

    def _strips(self, writer: ShardWriter, steps: Iterable[GroupStep]) -> Iterator[MemoryTask]:
        for step in (each for group in steps for each in group.weights):
            convert = carry_strip if step.method == CAST else convert_strip
            for strip in strips(step.weight, step.format.segment, self._tile_bytes):
                yield partial(self._convert, writer, partial(convert, step, strip))

    def _batches(self, writer: ShardWriter, steps: Iterable[GroupStep]) -> Iterator[MemoryTask]:
        for batch in batches(steps, self._tile_bytes):
            yield partial(self._convert, writer, partial(convert_batch, self._plan, batch))

    def _tiles(self, writer: ShardWriter, steps: Iterable[GroupStep]) -> Iterator[MemoryTask]:
        for step in steps:
            yield partial(self._find_scale, writer, step)
            while self._source.is_remote and self._scales.is_searching:  # what is held of one group is much already
                yield self._await_scale

    def _await_scale(self, _memory: WorkerMemory) -> None:
        self._scales.wait(POLL_SECONDS)

    def _find_scale(self, writer: ShardWriter, step: GroupStep, _memory: WorkerMemory) -> None:
        """Find the largest magnitude over all members, wherever they lie; then quantize those of this shard."""
        members = self._plan.members(step.weights[0].weight)
        searched = list(amax_tiles(members, self._tile_bytes))
        work = [(each, tile) for each in step.weights for tile in _family(each).tiles(each, self._tile_bytes)]
        writer.expect(len(work))
        search = AmaxSearch(members, len(searched), partial(_family(step.weights[0]).scale, self._plan.method))
        if self._scales.begin(step.name, search, partial(self._quantize_group, writer, work)):
            self._pool.add(partial(self._find_amax, step, tile) for tile in searched)

    def _find_amax(self, step: GroupStep, tile: Tile, memory: WorkerMemory) -> None:
        try:
            found = _family(step.weights[0]).amax(memory, tile)
        except NonFiniteWeightError:
            for weight in self._plan.members(step.weights[0].weight) if step.is_transposed else ():
                for part in tiles(weight, self._tile_bytes):  # a tile of what is stored says neither which nor where
                    memory.amax(part)
            raise
        self._scales.found(step.name, found)

    def _quantize_group(self, writer: ShardWriter, work: Iterable[tuple[QuantizeWeight, Tile]], scale: float) -> None:
        conversions = (partial(convert_tile, self._plan, GroupTile(step, tile, scale)) for step, tile in work)
        tasks = (partial(self._convert, writer, each) for each in conversions)
        self._pool.add(partial(self._run_task, writer, task) for task in tasks)


def _family(step: QuantizeWeight) -> Family:
    return family_of(step.format, step.method)
