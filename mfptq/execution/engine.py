"""Run a plan's shards: tiles through reused buffers on worker threads, finished files behind them.

Every fused group is gone through twice: its largest magnitude, then its bytes. Groups that fit into a tile are read once;
larger ones stream, and their second reading comes from the page cache. Nothing here decides: the plan has decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from threading import Lock

from ..checkpoint.weights import name_pattern
from ..kernels import QuantizeArgs, WeightBatch
from ..kernels.calibrated import PreparedStatistics
from ..nvfp4 import BLOCK_SIZE
from ..output.destination import Destination
from ..output.journal import ShardResult
from ..output.shard_writer import OpenShard
from ..planning.jobs import CopyRun, QuantizeWeight, ShardPlan, copy_runs, largest_first
from ..planning.plan import Plan
from ..storage.partial_file import Piece
from .bundles import Bundle, bundles
from .global_scales import AmaxSearch, GlobalScales, global_scale, scalar
from .memory_budget import PARTS, exceeds_half_of_memory
from .tiles import GroupStep, Tile, group_steps, tiles
from .worker_memory import Quantized, WorkerMemory
from .worker_pool import Task, Workers, running_pool

MAX_OPEN = 16  # files that are begun and not finished are lost with the power
MAX_FINISHING = 4
MAX_WRITING = 8
MAX_SYNCING = 4
BufferTask = Task[WorkerMemory]
Stretches = Iterable[tuple[int, int]]
WeightTile = tuple[QuantizeWeight, Tile]


@dataclass(frozen=True, slots=True)
class Progress:
    """What has just happened: `source_bytes` are dealt with; `total` is all there is; `finished` names a complete shard."""

    source_bytes: int = 0
    total: int = 0
    finished: str = ""
    resumed: bool = False


ProgressCallback = Callable[[Progress], None]


class Execution:
    """One run of a plan into a destination; `run` returns when every shard is durable."""

    def __init__(
        self, plan: Plan, destination: Destination, buffers: Sequence[WorkerMemory], progress: ProgressCallback
    ) -> None:
        self._plan = plan
        self._source = plan.checkpoint.source
        self._destination = destination
        self._tile_bytes = buffers[0].tile_bytes
        self._progress = progress
        self._scales = GlobalScales(plan.method)
        self._open: dict[str, OpenShard] = {}
        self._buffers = buffers
        self._lanes = max(1, min(len(buffers), len(plan.shards), MAX_OPEN))
        self._forget = exceeds_half_of_memory(plan.checkpoint.tensor_bytes + plan.tensor_bytes)
        self._writer = running_pool(min((PARTS - 1) * len(buffers), MAX_WRITING), "mfptq-write")
        self._finisher = running_pool(min(self._lanes + 1, MAX_SYNCING), "mfptq-finish")
        self._flusher = running_pool(1, "mfptq-flush")
        self._finishing: list[Future[None]] = []
        self._waiting = Lock()  # held by whoever looks after the shards that are being made durable
        shards = iter(largest_first(plan.shards))
        self._workers: Workers[WorkerMemory] = Workers(
            [self._tasks(shards, lane) for lane in range(self._lanes)], buffers
        )

    def run(self, meanwhile: Callable[[], object]) -> None:
        """Do all the work that is not done yet; raise the first error, leaving no temporary behind.

        `meanwhile` is called in the calling thread while workers work.
        """
        self._progress(Progress(total=self._plan.checkpoint.tensor_bytes))
        try:
            self._workers.run(meanwhile)
            for buffers in self._buffers:
                buffers.wait_for_writing()
            self._wait_for_finishing(0)
        finally:
            for pool in (self._writer, self._finisher, self._flusher):
                pool.shutdown(wait=True, cancel_futures=True)
            for shard in self._open.values():
                shard.file.discard()

    def _wait_for_finishing(self, allowed: int) -> None:
        """Wait until at most `allowed` shards are being made durable; raise what went wrong with any."""
        with self._waiting:
            while len(self._finishing) > allowed:
                self._finishing.pop(0).result()
            for future in [future for future in self._finishing if future.done()]:
                self._finishing.remove(future)
                future.result()

    def _tasks(self, shards: Iterator[ShardPlan], lane: int) -> Iterator[BufferTask]:
        """Yield a lane's tasks shard by shard; a shard is opened when its first task is asked for."""
        for shard in shards:
            if shard.name in self._destination.done:
                read = self._plan.checkpoint.shard(shard.name).header.data_bytes
                self._progress(Progress(read, finished=shard.name, resumed=True))
                continue
            self._wait_for_finishing(MAX_FINISHING * self._lanes)
            job = self._plan.job(shard)
            opened = OpenShard(job, self._destination.create(job.name, job.size, direct=True), lane)
            self._open[job.name] = opened
            opened.file.write(job.head, 0)
            for task in self._shard_tasks(opened):
                opened.expect(1)
                yield task
            self._settle(opened)

    def _shard_tasks(self, shard: OpenShard) -> Iterator[BufferTask]:
        yield partial(self._copy, shard, copy_runs(shard.job.copies, self._tile_bytes))
        for small, steps in groupby(group_steps(shard.job.weights), self._is_small):
            if small:
                for bundle in bundles(steps, self._tile_bytes):
                    yield partial(self._convert_bundle, shard, bundle)
            else:
                for step in steps:
                    yield partial(self._start_group, shard, step)

    def _is_small(self, step: GroupStep) -> bool:
        """Return whether a group is read once, with others: it fits into a tile, has one dtype, and lies in one shard."""
        members = self._plan.group_of(step.weights[0].weight).members
        return step.nbytes <= self._tile_bytes and step.is_uniform and len(step.weights) == len(members)

    def _start_group(self, shard: OpenShard, step: GroupStep, _buffers: WorkerMemory) -> None:
        """Find the largest magnitude over all members, wherever they lie; then quantize those of this shard."""
        members = self._plan.members(step.weights[0].weight)
        found = [tile for weight in members for tile in tiles(weight, self._tile_bytes)]
        waiter = partial(self._quantize_group, shard, step)
        if self._scales.begin(step.name, AmaxSearch(members, len(found)), waiter):
            self._workers.add((partial(self._find_amax, step.name, tile) for tile in found), shard.lane)

    def _find_amax(self, group: str, tile: Tile, buffers: WorkerMemory) -> None:
        self._scales.found(group, buffers.amax(self._source, tile))

    def _quantize_group(self, shard: OpenShard, step: GroupStep, scale: float) -> None:
        work = []
        for weight in step.weights:
            shard.file.write_pieces(_scalars(weight, scale))
            work += [partial(self._quantize_tile, shard, (weight, tile), scale) for tile in self._tiles(weight)]
        shard.expect(len(work))
        self._workers.add(work, shard.lane)
        self._settle(shard)

    def _tiles(self, step: QuantizeWeight) -> Iterator[Tile]:
        return tiles(step.weight, self._tile_bytes)

    def _quantize_tile(self, shard: OpenShard, work: WeightTile, scale: float, buffers: WorkerMemory) -> None:
        step, tile = work
        data = buffers.read(self._source, tile)
        quantized = buffers.quantize(data, QuantizeArgs(step.method, scale), self._statistics(step, tile))
        shard.note(name_pattern(step.weight.module), quantized.stats)
        self._write(shard, _places(work, quantized), [(tile.offset, tile.nbytes)], buffers)

    def _convert_bundle(self, shard: OpenShard, bundle: Bundle, buffers: WorkerMemory) -> None:
        """Convert whole groups that fit into the buffer together: read once, written in as few runs as they lie in."""
        data = buffers.read_bundle(self._source, bundle)
        amax = bundle.of_groups(buffers.amax_each(data, bundle))
        method = self._plan.method
        divisors = bundle.for_weights([global_scale(method, found, bundle.dtype) for found in amax.tolist()])
        if self._plan.calibration is None:
            quantized = buffers.quantize_each(data, WeightBatch(method, bundle.starts, divisors))
        else:
            quantized = buffers.quantize_by(self._plan.statistics, data, bundle, divisors)
        for kind, stats in bundle.by_kind(quantized.stats).items():
            shard.note(kind, stats)
        self._write(shard, bundle.pieces(quantized.packed, quantized.scales, divisors), bundle.reads, buffers)

    def _write(self, shard: OpenShard, pieces: Iterable[Piece], reads: Stretches, buffers: WorkerMemory) -> None:
        """Have what is in memory written while the worker goes on, but hashed now, where the digest can take it.

        `reads` is what it was made from: (offset, size) in the source file, in bytes.
        """
        with buffers.timed("hash"):
            found = [(piece, shard.file.hash_at_hand(piece.data, piece.offset)) for piece in pieces]
        self._workers.expect()
        buffers.hand_over(self._writer, partial(self._store, shard, found, reads))
        self._follow(shard)

    def _store(self, shard: OpenShard, pieces: Iterable[tuple[Piece, bool]], reads: Stretches) -> None:
        try:
            for piece, hashed in pieces:
                shard.file.store(piece.data, piece.offset, hashed=hashed)
            for offset, size in reads:
                self._done(shard, offset, size)
            self._settle(shard)
        finally:
            self._workers.settle()

    def _statistics(self, step: QuantizeWeight, tile: Tile) -> PreparedStatistics | None:
        found = self._plan.statistics(step)
        return None if found is None else found.part(tile.start % step.weight.columns, tile.columns)

    def _done(self, shard: OpenShard, offset: int, size: int) -> None:
        """Note that a range of the source will not be read again."""
        if self._forget:
            self._source.drop_cached(shard.job.name, offset, size)
        self._progress(Progress(size))

    def _copy(self, shard: OpenShard, runs: Iterator[CopyRun], buffers: WorkerMemory) -> None:
        """Copy a run, and leave the next to whoever is free first: one core copies while the others quantize."""
        run = next(runs, None)
        if run is None:
            self._settle(shard)
            return
        with buffers.timed("copy"):
            data = buffers.read_bytes(self._source, shard.job.name, run.stretches)
        shard.expect(1)
        self._write(shard, [Piece(run.offset, data)], run.stretches, buffers)
        self._workers.add([partial(self._copy, shard, runs)], shard.lane)

    def _follow(self, shard: OpenShard) -> None:
        """Let the disk and the file's digest follow what is written: waiting for the disk is no worker's business."""
        if shard.file.unflushed:
            self._flusher.submit(shard.file.flush)
        if shard.begin_hashing():
            self._workers.add([partial(self._hash, shard)], shard.lane)

    def _hash(self, shard: OpenShard, buffers: WorkerMemory) -> None:
        with buffers.timed("hash"):
            shard.file.hash_written(buffers.memory)
        shard.hashing = False
        self._follow(shard)
        self._settle(shard)

    def _settle(self, shard: OpenShard) -> None:
        """Note that a piece of work is done. After the last, the disk and the digest work at the same time."""
        if shard.settle():
            shard.expect(2)
            self._later(self._sync, shard)
            self._workers.add([partial(self._complete_digest, shard)], shard.lane)

    def _later(self, finish: Callable[[OpenShard], None], shard: OpenShard) -> None:
        self._finishing.append(self._finisher.submit(finish, shard))

    def _sync(self, shard: OpenShard) -> None:
        """Make a shard's content durable, after its source proved unchanged."""
        self._plan.check_unchanged(shard.job.name)
        shard.file.sync()
        self._close(shard)

    def _complete_digest(self, shard: OpenShard, buffers: WorkerMemory) -> None:
        with buffers.timed("hash"):
            shard.digest = shard.file.sha256(buffers.memory)
        self._close(shard)

    def _close(self, shard: OpenShard) -> None:
        if shard.settle():
            self._later(self._commit, shard)

    def _commit(self, shard: OpenShard) -> None:
        """Give a shard its name, durably, and note it."""
        name = shard.job.name
        if self._forget:
            shard.file.forget()
            self._source.drop_cached(name, 0, 0)  # what tiles that end inside of the kernel's pages have left
        shard.file.commit()
        kinds = {kind: asdict(stats) for kind, stats in sorted(shard.kinds.items())}
        self._destination.record(ShardResult(name, shard.digest, shard.job.size, kinds))
        del self._open[name]
        self._progress(Progress(finished=name))


def _places(work: WeightTile, quantized: Quantized) -> tuple[Piece, Piece]:
    """Return where a quantized tile belongs in the output file."""
    step, tile = work
    return (
        Piece(step.packed + tile.start // 2, quantized.packed.reshape(-1).data),
        Piece(step.scale + tile.start // BLOCK_SIZE, quantized.scales.reshape(-1).data),
    )


def _scalars(step: QuantizeWeight, scale: float) -> list[Piece]:
    """Return a weight's scalars and where they belong."""
    pieces = [Piece(step.global_scale, scalar(scale))]
    if step.input_scale is not None:
        pieces.append(Piece(step.input_scale.offset, scalar(step.input_scale.divisor)))
    return pieces
