"""List the work on a shard in its order, and what that will read, for a source that fetches ahead over a network.

`engine` does the work, and hands what will be read to the source. Nothing depends on that being right: what is read against it
is only fetched later, or twice.

From a folder, what is copied comes first, as in the output, so that the output's digest follows the writes. Over a network the
source's bytes are wanted in the order of its file instead, so that the source's digest can follow them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.reads import SEGMENT_BYTES, ByteRange, ReadUnit
from ..planning.jobs import CopyTensor, ShardJob, WidenTensor, copy_runs, largest_first
from .tiles import GroupStep, group_steps, stored_end, whole

if TYPE_CHECKING:
    from ..checkpoint.weights import Weight
    from ..planning.plan import ConversionPlan

# Shards that are made at the same time. The digest of a file follows its writes where they come in order, which one worker's
# do; with two workers in one file, three quarters of it were read back: 10 % of a run on two cores, measured in turn, and
# half of the kernel's time on 16.
_OPEN_SHARDS = 4


def shards_at_once(workers: int, *, one_by_one: bool) -> int:
    """Return how many shards are made at the same time; `one_by_one` where they are read in order, or there is no room."""
    return 1 if one_by_one else min(_OPEN_SHARDS, workers)


class Work(NamedTuple):
    """Some of the work on a shard: what is done first comes first, kind by kind."""

    copies: Sequence[CopyTensor] = ()
    widened: Sequence[WidenTensor] = ()
    groups: Sequence[GroupStep] = ()


def work_order(job: ShardJob, *, by_source: bool) -> Iterator[Work]:
    """Yield the work on a shard in its order; `by_source`: in that of the source file."""
    groups = group_steps(job.weights)
    if not by_source:
        yield Work(job.copies, job.widened, groups)
        return
    yield Work(copies=[each for each in job.copies if each.shard])
    own = (each for each in job.copies if not each.shard)
    parts = [
        *((each.source_offset, Work(copies=[each])) for each in own),
        *((_begin(each.weight), Work(widened=[each])) for each in job.widened),
        *((min(_begin(step.weight) for step in each.weights), Work(groups=[each])) for each in groups),
    ]
    ordered = (work for _, work in sorted(parts, key=itemgetter(0)))
    for _, alike in groupby(ordered, lambda work: tuple(map(bool, work))):
        yield Work(*(list(chain.from_iterable(kind)) for kind in zip(*alike, strict=True)))


def _begin(weight: Weight) -> int:
    """Return where a weight, or its codes, begin in the source file."""
    return _stored(weight, weight.shard)[0].start


def reading_order(
    plan: ConversionPlan, done: Collection[str], held_bytes: int
) -> Iterator[tuple[str, Sequence[ReadUnit]]]:
    """Yield the name of each shard that is not done, and what its turn reads, if `held_bytes` may be held."""
    seen: set[str] = set()

    def members(step: GroupStep) -> list[Weight]:
        """Return what is read of a fused group: in its first turn all of it, since its scale is found then."""
        weights = [each.weight for each in step.weights]
        if step.name in seen:
            return weights
        seen.add(step.name)
        return [member for member in plan.members(weights[0]) if member.shard not in done]

    for shard in largest_first(plan.shards):
        if shard.name not in done:
            job = plan.job(shard)
            found = (_read(job.name, work, members) for work in work_order(job, by_source=True))
            yield job.name, list(_closed(_units(chain.from_iterable(found)), job.name, held_bytes))


def bytes_to_fetch(plan: ConversionPlan, held_bytes: int) -> int:
    """Return how many bytes a run fetches from a remote source: all, and once more what lies in groups too large to hold."""
    return plan.checkpoint.tensor_bytes + sum(nbytes for nbytes in _group_bytes(plan) if nbytes > held_bytes)


def largest_group(plan: ConversionPlan, held_bytes: int) -> int:
    """Return the size of the largest fused group of at most `held_bytes`."""
    return max((nbytes for nbytes in _group_bytes(plan) if nbytes <= held_bytes), default=0)


def _group_bytes(plan: ConversionPlan) -> Collection[int]:
    groups: defaultdict[str, int] = defaultdict(int)
    for weight in plan.weights():
        groups[plan.group_of(weight).name] += weight.nbytes
    return groups.values()


def _read(turn: str, work: Work, members: Callable[[GroupStep], Iterable[Weight]]) -> Iterator[list[ByteRange]]:
    """Yield what each piece of some work reads, in the turn of a shard."""
    yield from (_copied(run.shard or turn, run.ranges) for run in copy_runs(work.copies, SEGMENT_BYTES))
    yield from (_stored(each.weight, turn) for each in work.widened)
    yield from ([stored for weight in members(step) for stored in _stored(weight, turn)] for step in work.groups)


def _closed(units: Iterable[ReadUnit], turn: str, most: int) -> Iterator[ReadUnit]:
    """Yield units with those that lie among each other as one, of `most` bytes at most: they are fetched as they lie."""
    last: ReadUnit | None = None
    end = 0
    for unit in units:
        own = [each for each in unit.ranges if each.name == turn]
        if last is not None and own and own[0].start < end and last.size + unit.size <= most:
            last = ReadUnit(_joined([*last.ranges, *unit.ranges]))
        else:
            if last is not None:
                yield last
            last = unit
        end = max([end, *(each.end for each in own)])
    if last is not None:
        yield last


def _copied(name: str, ranges: Iterable[tuple[int, int]]) -> list[ByteRange]:
    return [ByteRange(name, offset, offset + size) for offset, size in ranges]


def _stored(weight: Weight, turn: str) -> list[ByteRange]:
    """Return where a weight, or its codes, lie; scales are small, and fetched when they are asked for."""
    later = weight.shard != turn
    if weight.encoding is None:
        return [ByteRange(weight.shard, weight.offset, stored_end(weight), later, weight.pitch > 0)]
    return [ByteRange(weight.shard, offset, offset + size, later) for offset, size in whole(weight).ranges]


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
        if last is not None and _alike(last) == _alike(each) and each.start <= last.end:
            joined[-1] = last._replace(end=max(last.end, each.end))
        elif each.size:
            joined.append(each)
    return tuple(joined)


def _alike(place: ByteRange) -> tuple[str, bool, bool]:
    return place.name, place.later, place.shared
