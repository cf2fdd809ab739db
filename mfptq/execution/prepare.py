"""Prepare a run: device, kernel, and the memory of each worker, within the ceiling that was given.

Called by `conversion` before the destination is touched, so that what cannot work is refused first.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from ..dtypes import DTYPE_BITS, NUMPY_DTYPES
from ..errors import UsageError
from ..kernels import Kernel, back_end, is_cuda, load_kernel
from ..kernels.calibrated import FEEDBACK
from ..kernels.choice import choose_device
from ..kernels.transposing import load_transposer
from ..nvfp4 import BLOCK_SIZE
from ..sizes import parse_size
from ..storage.parallel import available_cores
from .events import OnEvent, ignore
from .families import family_of
from .memory_budget import MemoryPlan, check_data_limit, plan_memory, resident_bytes
from .worker_memory import WorkerMemory

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan

TALLER = 2
_SIDE = 64  # rows and columns of a matrix that compiled code surely transposes
REMOTE_TILE = 2**20  # bytes; what is fetched ahead takes memory too, and the network is slower than small tiles


class ResourceKeywords(TypedDict, total=False):
    """The keywords `max_memory`, `max_workers` and `device`, as `convert` describes them; each may be left out."""

    max_memory: str | int
    max_workers: int | None
    device: str


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use; none of it changes the output. `max_memory` is a ceiling for the process, in bytes or text."""

    max_memory: str | int = "1GiB"
    max_workers: int | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Measuring:
    """What a pass over the weights may use before a plan stands: `held` bytes of the process are the caller's own.

    `path` is a file that keeps what the pass finds, None for no file.
    """

    resources: Resources = field(default_factory=Resources)
    on_event: OnEvent = ignore
    held: int = 0
    path: str | Path | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A conversion about to start."""

    plan: ConversionPlan
    kernel: Kernel
    memory: MemoryPlan
    device_reason: str
    begun: float = field(default_factory=time.monotonic)

    def worker_memories(self) -> list[WorkerMemory]:
        """Return what each worker owns while the run lasts."""
        return [self.worker_memory(self.memory.tile_bytes) for _ in range(self.memory.workers)]

    def worker_memory(self, tile_bytes: int) -> WorkerMemory:
        """Return what a worker owns, with room for tiles of so many bytes."""
        return WorkerMemory(self.plan.checkpoint.source, self.kernel, tile_bytes)


def prepare(plan: ConversionPlan, resources: Resources, held: int = 0) -> Run:
    """Return a run that fits into its memory; `held` bytes of the process are the caller's own.

    Raises UsageError for a device or number of workers that cannot be, MemoryBudgetError where the memory is too little.
    """
    workers = resources.max_workers if resources.max_workers is not None else available_cores()
    if workers < 1:
        raise UsageError(f"max_workers is {workers}, expected at least 1")
    budget = parse_size(resources.max_memory) + held
    statistics = plan.statistics_bytes
    work = Counter[str]()
    for run in plan.runs():
        work[run.target.method] += run.weights[0].size * len(run.weights)
    choice = choose_device(resources.device, work, workers)
    check_data_limit(back_end(choice.device))
    kernel = load_kernel(choice.device)
    _try_out(plan, kernel)
    largest = kernel.tile_bytes
    if any(run.weights[0].pitch for run in plan.runs()):
        largest *= TALLER  # a row of a tile is a separate read of each column: taller tiles need fewer
    elif plan.checkpoint.source.is_remote and not is_cuda(choice.device):
        largest = min(largest, REMOTE_TILE)
    memory = plan_memory(
        budget, resident_bytes(), workers, statistics=statistics, largest_tile=largest, row=longest_row(plan)
    )
    return Run(plan, kernel, memory, choice.reason)


def longest_row(plan: ConversionPlan) -> int:
    """Return the size of the longest row that must lie in one tile, in bytes: where columns make up for others' errors."""
    rows = (run.weights[0] for run in plan.runs() if run.target.method == FEEDBACK)
    return max((weight.columns * DTYPE_BITS[weight.dtype] // 8 for weight in rows), default=0)


def _try_out(plan: ConversionPlan, kernel: Kernel) -> None:
    """Call every function that the run will need once: what they bring, or take to compile, must be in the memory plan."""
    plan.contents.try_out(plan.checkpoint.source, kernel.decoder)
    shown = [(run.weights[0], run.target) for run in plan.runs()]
    needed = {(weight.dtype, weight.encoding is None, target): weight for weight, target in shown}
    for (dtype, plain, (target, method)), weight in needed.items():
        block = np.zeros((1, BLOCK_SIZE), NUMPY_DTYPES[dtype])
        with plan.checkpoint.source.reading(weight.shard, weight.offset, block.nbytes if plain else 0) as fd:
            if fd is not None and plain:
                kernel.amax_in_file(fd, weight.offset, np.empty_like(block))
        kernel.amax(block)
        family_of(target, method).try_out(method, block, kernel)
    for dtype in {weight.dtype for weight, _ in shown if weight.pitch}:
        block = np.zeros((_SIDE, _SIDE), NUMPY_DTYPES[dtype])
        load_transposer().transpose(block, np.empty_like(block))
