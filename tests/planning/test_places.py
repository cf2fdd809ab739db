"""Places planned = bytes written: every byte of an output file is written once, where its header says, whatever the shapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import mfptq
from mfptq.checkpoint.folder import Origin, read_checkpoint, read_shard
from mfptq.checkpoint.header import tensor_bytes
from mfptq.checkpoint.source import FolderSource
from mfptq.errors import MfptqError
from mfptq.execution.tiles import batches, group_steps, tiles
from mfptq.planning.building import build_plan
from mfptq.planning.formats import FormatRule
from mfptq.planning.jobs import ShardJob, copy_runs
from mfptq.planning.settings import Settings
from mfptq.scales.reading import read_input_scales
from tests.conftest import sampled
from tests.faults.conversions import Example, examples, write
from tests.faults.faulty import FaultyFiles

FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
PARTS = sampled([0], [1, 2, 3])  # of the examples: each part draws its own
Range = tuple[int, int]  # first byte, and the one after the last


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("places")


def checkpoint(example: Example, place: Path) -> Path:
    """Write an example's checkpoint in place of the one before."""
    for name in ("source", "out"):
        shutil.rmtree(place / name, ignore_errors=True)
    write(example, place / "source", np.random.default_rng(0))
    return place / "source"


def planned(source: Path, scales: Path | None, rules: tuple[FormatRule, ...] = ()):
    """Return the plan of a conversion; examples that cannot be converted are passed over."""
    try:
        return build_plan(
            read_checkpoint(Origin(source)), Settings(formats=rules), read_input_scales(scales) if scales else None
        )
    except MfptqError:
        assume(condition=False)


def with_scales(source: Path, place: Path) -> Path:
    """Write input scales for all that is quantized."""
    plan = planned(source, None)
    modules = [weight.module for weight in plan.weights()]
    plan.close()
    (place / "scales.json").write_text(json.dumps({"kind": "amax", "values": dict.fromkeys(modules, 3.2)}))
    return place / "scales.json"


def of_job(job: ShardJob) -> Iterator[Range]:
    """Yield the ranges that a job fills."""
    yield 0, len(job.head)
    yield from ((copy.offset, copy.offset + copy.size) for copy in job.copies)
    for step in job.weights:
        places = {
            step.format.data_suffix: step.values,
            "weight_scale": step.scale,
            "weight_global_scale": step.global_scale,
        }
        for each in step.format.tensors(step.weight, step.method):
            if each.suffix in places:
                yield places[each.suffix], places[each.suffix] + tensor_bytes(each.dtype, each.shape)
        if step.input_scale is not None:
            yield step.input_scale.offset, step.input_scale.offset + 4


def of_header(path: Path) -> set[Range]:
    """Return the ranges that a file's own header names, and the header's."""
    source = FolderSource(path.parent)
    header = read_shard(source, path.name).header
    source.close()
    start = header.data_start
    return {(0, start), *((start + each.start, start + each.end) for each in header.tensors if each.nbytes)}


def joined(ranges: Iterator[Range]) -> list[Range]:
    """Return ranges in order, neighbours as one; none may overlap."""
    result: list[Range] = []
    for begin, end in sorted(each for each in ranges if each[0] < each[1]):
        assert not result or begin >= result[-1][1], f"byte {begin} has two owners"
        if result and begin == result[-1][1]:
            begin = result.pop()[0]
        result.append((begin, end))
    return result


@pytest.mark.parametrize("part", PARTS)
@FEW
@given(examples(), st.booleans(), st.sampled_from(["", "fp8-dynamic", "fp8-block", "fp8-static"]))
def test_every_place_is_planned_once_and_written_once(
    place: Path, part: int, example: Example, scaled: bool, target: str
) -> None:
    source = checkpoint(example, place)
    scales = with_scales(source, place) if scaled else None
    rules = (FormatRule(target, "re:.*"),) if target else ()
    plan = planned(source, scales, rules)
    jobs = {shard.name: plan.job(shard) for shard in plan.shards}
    plan.close()
    with FaultyFiles((place / "out",), tracing=True) as files:
        mfptq.convert(source, place / "out", input_scales=scales, formats=[str(rule) for rule in rules])
    files_of = {event.node: Path(event.other).name for event in files.events if event.kind == "rename"}
    for name, job in jobs.items():
        ranges = joined(of_job(job))
        assert ranges == joined(iter(of_header(place / "out" / name)))
        writes = [event for event in files.events if event.kind == "write" and files_of.get(event.node) == name]
        assert joined((event.offset, event.offset + len(event.data)) for event in writes) == ranges
        assert (place / "out" / name).stat().st_size == job.size == ranges[-1][1]


@pytest.mark.parametrize("part", PARTS)
@FEW
@given(examples(), st.integers(1, 64), st.booleans())
def test_tiles_batches_and_runs_cover_their_places(
    place: Path, part: int, example: Example, blocks: int, scaled: bool
) -> None:
    source = checkpoint(example, place)
    plan = planned(source, with_scales(source, place) if scaled else None)
    limit = 64 * blocks  # one block of 16 in float32 is 64 bytes
    for job in (plan.job(shard) for shard in plan.shards):
        copies = joined((copy.offset, copy.offset + copy.size) for copy in job.copies)
        runs = list(copy_runs(job.copies, limit))
        assert joined((run.offset, run.offset + sum(size for _, size in run.ranges)) for run in runs) == copies
        for step in job.weights:
            parts = [(tile.start, tile.start + tile.size) for tile in tiles(step.weight, limit)]
            assert joined(iter(parts)) == [(0, step.weight.size)]
            assert all(tile.nbytes <= limit for tile in tiles(step.weight, limit))
        steps = [step for step in group_steps(job.weights) if step.is_uniform]
        for batch in batches(steps, limit):
            sizes = [step.weight.size for step in batch.steps]
            pieces = batch.pieces(
                *(np.zeros(sum(sizes) // part, np.uint8) for part in (2, 16)), np.ones(len(sizes), np.float32)
            )
            inner = ShardJob("", b"", 0, (), batch.steps)
            assert joined((piece.offset, piece.offset + len(piece.data)) for piece in pieces) == joined(of_job(inner))
    plan.close()
