"""Find what each candidate format would cost every layer: one pass over the weights, tile by tile, nothing written.

Called by `execution.size_target`. Errors are squared: of a layer's outputs where a calibration file has second moments or
Hessian blocks of its inputs, of its weights otherwise. Tiles have one size whatever the memory, and sums are exact, so that
neither memory nor threads change a result. A tile has the NVFP4 global scale of its own largest magnitude, which a power of
two apart gives the same values: so every weight is read once.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .. import fp8, nvfp4
from ..checkpoint.weights import Weight
from ..errors import MemoryBudgetError
from ..fp8 import Segments, minmax_scales, search_scales
from ..kernels import QuantizeArgs, TileArray
from ..kernels.fp8 import quantize_fp8
from ..nvfp4 import BLOCK_SIZE, Float32Array
from ..planning.allocation import NORM, REFERENCE
from ..planning.formats import FORMATS, KEEP
from ..planning.jobs import CAST
from ..planning.weight_targets import weight_target
from ..sizes import size_text
from .conversions import of_columns
from .events import Advanced, OnEvent, Planned
from .families import FAMILIES
from .global_scales import global_scale
from .memory_budget import plan_memory, resident_bytes
from .output_errors import OutputErrors
from .prepare import Measuring, Run, prepare
from .tiles import Tile, tiles
from .worker_memory import WorkerMemory
from .worker_pool import Task, WorkerPool

if TYPE_CHECKING:
    from ..kernels.calibrated import PreparedStatistics
    from ..names.fusion import FusedGroup
    from ..planning.plan import ConversionPlan
    from ..planning.size_units import Layers

TILE_BYTES = 2**20
BUFFER_BYTES = 2 * TILE_BYTES  # a tile, and behind it the codes that it becomes in FP8
PLAIN = "minmax"  # the method of the reference


@dataclass(frozen=True, slots=True)
class _Group:
    """A fused group, the formats that its weights are tried in, and how errors of its outputs follow from theirs."""

    group: FusedGroup
    formats: tuple[str, ...]
    outputs: OutputErrors | None


def measure_errors(
    plan: ConversionPlan, layers: Sequence[Layers], formats: Iterable[str], measuring: Measuring
) -> dict[str, dict[str, float]]:
    """Return by fused group the squared errors of its base format, of `formats`, of plain NVFP4, and the weights' norm.

    Raises MemoryBudgetError where the memory is too little, NonFiniteWeightError for weights that no format holds.
    """
    run = prepare(plan, measuring.resources, measuring.held)
    memories = [run.worker_memory(BUFFER_BYTES) for _ in range(_workers(run))]
    measuring.on_event(Planned(sum(weight.nbytes for each in layers for weight in each.weights)))
    found = _Pass(plan, layers, [each for each in formats if each != KEEP], memories).run(measuring.on_event)
    return {
        name: {what: math.fsum(parts) for what, parts in sorted(errors.items())}
        for name, errors in sorted(found.items())
    }


def _workers(run: Run) -> int:
    """Return how many workers fit into the memory: fewer of them rather than smaller tiles, which would change results."""
    block = np.zeros((1, BLOCK_SIZE), np.float32)
    for family in FAMILIES.values():
        # What it brings must be in memory before that is counted.
        family.try_out(PLAIN, block, run.kernel)
    budget = run.memory.peak + run.memory.spare
    statistics = run.plan.statistics_bytes
    for workers in range(run.memory.workers, 0, -1):
        found = plan_memory(budget, resident_bytes(), workers, statistics=statistics, largest_tile=BUFFER_BYTES)
        if found.tile_bytes == BUFFER_BYTES:
            return found.workers
    raise MemoryBudgetError(
        f"max_memory is {size_text(budget)}, the errors of formats take {size_text(budget + 2 * BUFFER_BYTES, up=True)}"
    )


class _Pass:
    """One pass. Threads: `_measure` runs on workers; `_lock` guards `_found`, the parts of each group's sums."""

    def __init__(
        self, plan: ConversionPlan, layers: Iterable[Layers], formats: Sequence[str], memories: Sequence[WorkerMemory]
    ) -> None:
        self._plan = plan
        self._formats = formats
        self._found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._lock = threading.Lock()
        self._pool = WorkerPool([self._tasks(layers)], memories)

    def run(self, on_event: OnEvent) -> Mapping[str, Mapping[str, Sequence[float]]]:
        """Try every format on every tile; return what each costs, by fused group, tile by tile."""
        self._pool.run(on_event)
        return self._found

    def _tasks(self, layers: Iterable[Layers]) -> Iterator[Task[WorkerMemory]]:
        """Yield a task for each tile, in the order in which the weights lie in their files."""
        work = [(group, weight) for each in layers for group in each.groups for weight in _members(each, group)]
        groups: dict[str, _Group] = {}
        for group, weight in sorted(work, key=lambda pair: (pair[1].shard, pair[1].offset)):
            if group.name not in groups:
                groups[group.name] = self._opened(group, weight)
            for tile in tiles(weight, TILE_BYTES):
                yield partial(self._measure, groups[group.name], tile)

    def _opened(self, group: FusedGroup, weight: Weight) -> _Group:
        base = self._plan.format_of(weight).name
        return _Group(group, (base, *self._formats), OutputErrors.of(self._plan.calibration, weight.module))

    def _measure(self, group: _Group, tile: Tile, memory: WorkerMemory) -> None:
        """Try every format on a tile, and note what each costs."""
        data = memory.read(tile)
        largest = float(memory.amax_segments(data, np.array([0, data.size], np.int64), tile)[0])
        method = self._plan.method_of(tile.weight)
        method = "search" if method == CAST else method  # values that NVFP4 can hold, which `search` finds too
        costs: dict[str, float] = {}
        for name, how in ((group.formats[0], method), (REFERENCE, PLAIN)):
            scale = global_scale(how, largest, tile.weight.dtype)
            args = QuantizeArgs(how, scale, self._known(tile, how))
            costs[name], costs[NORM] = _nvfp4(group, tile, (data, args), memory)
        for name in group.formats[1:]:
            how = weight_target(tile.weight.module, FORMATS[name], self._plan.method, self._plan.calibration).method
            costs[name] = _fp8(group, tile, (data, how), memory)
        with self._lock:
            for name, cost in costs.items():
                self._found[group.group.name][name].append(cost)
        self._pool.emit(Advanced(tile.nbytes))

    def _known(self, tile: Tile, method: str) -> PreparedStatistics | None:
        calibration = self._plan.calibration
        return None if calibration is None else of_columns(calibration.statistics(tile.weight.module, method), tile)


def _members(layers: Layers, group: FusedGroup) -> Iterator[Weight]:
    return (weight for weight in layers.weights if weight.module in group.members)


def _nvfp4(
    group: _Group, tile: Tile, work: tuple[TileArray, QuantizeArgs], memory: WorkerMemory
) -> tuple[float, float]:
    """Return the squared error of a tile in NVFP4, and its squared norm."""
    data, args = work
    done = memory.quantize(data, args)
    if group.outputs is None:
        return done.stats.squared_error, done.stats.squared_weight

    def decoded(rows: slice) -> Float32Array:
        return nvfp4.dequantize(done.packed[rows], done.scales[rows], args.global_scale)

    return group.outputs.cost(tile, data, decoded), group.outputs.norm(tile, data)


def _fp8(group: _Group, tile: Tile, work: tuple[TileArray, str], memory: WorkerMemory) -> float:
    """Return the squared error of a tile in FP8, each of its rows with a scale of its own."""
    data, method = work
    starts = np.arange(0, data.size + 1, tile.columns, dtype=np.int64)
    amax = memory.amax_segments(data, starts, tile)
    exact, dtype = method == PLAIN, tile.weight.dtype
    others = minmax_scales(amax, dtype)
    codes = np.frombuffer(memory.bytes, np.uint8)[TILE_BYTES : TILE_BYTES + data.size]  # behind the tile
    scales, stats = quantize_fp8(
        data.reshape(-1), Segments(starts, others if exact else search_scales(amax), others, exact), codes
    )
    if group.outputs is None:
        return stats.squared_error

    def decoded(rows: slice) -> Float32Array:
        return fp8.dequantize(codes.reshape(data.shape)[rows], scales[rows, None])

    return group.outputs.cost(tile, data, decoded)
