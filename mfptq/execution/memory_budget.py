"""Keep a run within its memory limit: choose tiles and workers that fit, or refuse at once and name the least that works.

Called by `execution.prepare` once the kernels are loaded; the figures of a process's memory serve others too. Nothing is
allocated here.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import MemoryBudgetError
from ..sizes import size_text

MAX_TILE = 4 * 2**20
MIN_TILE = 256 * 2**10
PER_WORKER = 2 * 2**20  # stack, kernel scratch, allocator slack
RESERVE = 24 * 2**20  # a shard's steps, hashing, journal, progress
INTERPRETER = 128 * 2**20  # what a process holds before its caller has anything of its own
THREAD_BYTES = 8 * 2**20  # a stack
# What loading a kernel takes of the data segment, where it must be compiled first too.
KERNEL_BYTES = {"cpu": 60 * 2**20, "cuda": 400 * 2**20, "torch": 330 * 2**20}


def resident_bytes() -> int:
    """Return the memory that this process holds now, in bytes."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes()


def caller_bytes() -> int:
    """Return what this process holds beyond a bare interpreter, in bytes: the calling program's own."""
    return max(0, resident_bytes() - INTERPRETER)


def peak_bytes() -> int:
    """Return the most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a fresh process counts its parent's memory before exec
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Return the memory that the machine, or the group this process is confined to, can still give; None if unknown."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        limits += [int(found[1]) * 1024] if found else []
    for path in _group_limits():
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits, default=None)


def exceeds_half_of_memory(size: int) -> bool:
    """Return whether so many bytes of files would push everything else out of the page cache."""
    available = available_bytes()
    return available is not None and size > available // 2


def _group_limits() -> Iterator[Path]:
    """Yield where the memory limits of this process's control groups and of their parents would be (cgroup v2, v1)."""
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = ("memory/", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        for folder in (PurePosixPath(group), *PurePosixPath(group).parents):
            yield Path(f"/sys/fs/cgroup/{root}{str(folder).lstrip('/')}") / name


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a budget is spent: `peak` is the most the process will hold, `spare` what the budget leaves, in bytes."""

    workers: int
    tile_bytes: int
    peak: int
    spare: int = 0


def buffer_bytes(tile_bytes: int) -> int:
    """Return how much a tile and what it becomes take."""
    return tile_bytes + tile_bytes // 4 + tile_bytes // 32


def worker_bytes(tile_bytes: int, statistics: int = 0) -> int:
    """Return what one worker holds: a tile and what it becomes, scratch, an input's statistics in two forms."""
    return buffer_bytes(tile_bytes) + PER_WORKER + 2 * statistics


def plan_memory(
    budget: int, held: int, workers: int, *, statistics: int = 0, largest_tile: int = MAX_TILE, row: int = 0
) -> MemoryPlan:
    """Return tiles and workers that fit into `budget` bytes when the process already holds `held`.

    `statistics` is the size of the largest statistics of one input, in bytes: each worker holds one input's as read and as
    prepared, and two inputs' are kept besides.

    `largest_tile` is what suits the kernel, `row` what every tile must hold at least, in bytes. Tiles shrink first, then
    workers; raises MemoryBudgetError, naming the least that works, when one small tile is too much.
    """
    base, smallest = held + RESERVE + 2 * statistics, max(MIN_TILE, row)
    least = base + worker_bytes(smallest, statistics)
    if budget < least:
        raise MemoryBudgetError(
            f"max_memory is {size_text(budget)}, the least that works here is {size_text(least, up=True)}"
        )
    count = min(workers, (budget - base) // worker_bytes(smallest, statistics))
    tile = max(largest_tile, smallest)
    while tile > smallest and base + count * worker_bytes(tile, statistics) > budget:
        tile = max(tile // 2, smallest)
    peak = base + count * worker_bytes(tile, statistics)
    return MemoryPlan(count, tile, peak, max(0, budget - peak))


def check_data_limit(kernel: str) -> None:
    """Raise MemoryBudgetError if `ulimit -d` leaves too little to load a kernel: libraries that run out may just crash."""
    status = Path("/proc/self/status")
    found = re.search(r"VmData:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found is None:
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    needed = int(found[1]) * 1024 + KERNEL_BYTES[kernel] + RESERVE + worker_bytes(MIN_TILE) + THREAD_BYTES
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise MemoryBudgetError(
            f"the system's limit on data (ulimit -d) is {size_text(limit)}, about {size_text(needed, up=True)} are needed"
        )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn what the interpreter raises where the system gives no more memory or threads into MemoryBudgetError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        of_torch = type(error).__name__ == "OutOfMemoryError"
        if isinstance(error, RuntimeError) and not of_torch and "start new thread" not in str(error):
            raise
        raise MemoryBudgetError(
            "memory ran out: lower max_workers or max_memory, or raise the system's limit; "
            "rerun the same command to resume"
        ) from None
