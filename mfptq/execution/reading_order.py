"""List what a run will read, in the order of its work, for a source that fetches ahead over a network.

`engine` hands it to the source. Nothing depends on it being right: what is read against it is only fetched later, or twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from ..checkpoint.reads import SEGMENT_BYTES, ByteRange, ReadUnit
from ..planning.jobs import ShardJob, copy_runs, largest_first
from .tiles import group_steps, stored_end, whole

if TYPE_CHECKING:
    from ..checkpoint.weights import Weight
    from ..planning.plan import ConversionPlan


def reading_order(plan: ConversionPlan, done: Collection[str]) -> Iterator[tuple[str, Sequence[ReadUnit]]]:
    """Yield the name of each shard that is not done, and what its turn reads."""
    seen: set[str] = set()
    for shard in largest_first(plan.shards):
        if shard.name not in done:
            job = plan.job(shard)
            copies = (_copied(run.shard or job.name, run.ranges) for run in copy_runs(job.copies, SEGMENT_BYTES))
            widened = (_stored(each.weight, job.name) for each in job.widened)
            yield job.name, list(_units(chain(copies, widened, _groups(plan, job, seen, done))))


def bytes_to_fetch(plan: ConversionPlan, held_bytes: int) -> int:
    """Return how many bytes a run fetches from a remote source: all, and once more what lies in groups too large to hold."""
    groups: defaultdict[str, int] = defaultdict(int)
    for weight in plan.weights():
        groups[plan.group_of(weight).name] += weight.nbytes
    return plan.checkpoint.tensor_bytes + sum(nbytes for nbytes in groups.values() if nbytes > held_bytes)


def _copied(name: str, ranges: Iterable[tuple[int, int]]) -> list[ByteRange]:
    return [ByteRange(name, offset, offset + size) for offset, size in ranges]


def _stored(weight: Weight, turn: str) -> list[ByteRange]:
    """Return where a weight, or its codes, lie; scales are small, and fetched when they are asked for."""
    later = weight.shard != turn
    if weight.encoding is None:
        return [ByteRange(weight.shard, weight.offset, stored_end(weight), later)]
    return [ByteRange(weight.shard, offset, offset + size, later) for offset, size in whole(weight).ranges]


def _groups(plan: ConversionPlan, job: ShardJob, seen: set[str], done: Collection[str]) -> Iterator[list[ByteRange]]:
    """Yield the weights of each fused group; in its first turn all of it, since its scale is found then."""
    for step in group_steps(job.weights):
        weights = [each.weight for each in step.weights]
        if step.name not in seen:
            seen.add(step.name)
            weights = [member for member in plan.members(weights[0]) if member.shard not in done]
        yield [stored for each in weights for stored in _stored(each, job.name)]


def _units(found: Iterable[list[ByteRange]]) -> Iterator[ReadUnit]:
    """Yield units of one request at least, so that small groups that lie side by side are fetched together."""
    together: list[ByteRange] = []
    size = 0
    for ranges in found:
        together += ranges
        size += sum(each.size for each in ranges)
        if size >= SEGMENT_BYTES:
            yield ReadUnit(_joined(together))
            together, size = [], 0
    if together:
        yield ReadUnit(_joined(together))


def _joined(ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """Return ranges in the order of their files, neighbours and those that overlap as one."""
    joined: list[ByteRange] = []
    for each in sorted(ranges):
        last = joined[-1] if joined else None
        if last is not None and (last.name, last.later) == (each.name, each.later) and each.start <= last.end:
            joined[-1] = last._replace(end=max(last.end, each.end))
        elif each.size:
            joined.append(each)
    return tuple(joined)
