"""Make a whole output: claim its folder, let an executor make the shards, finish with config.json, publish, and report.

Called by `conversion`, and by nothing else. An output that is complete already is checked and left as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..output.claim import OutputClaim
from ..output.destination import Destination, open_destination
from ..output.finish import finish, source_card
from ..output.finished import finished_by, finished_report
from ..output.leftovers import abandon
from ..output.model_card import card_metadata, card_text
from ..output.publish import Publisher, push
from ..output.report import Report, gather, pattern_reports, suspicions, total_error
from ..output.uploads import SHARDS_AT_ONCE, Uploads, published_report, uploading
from .events import Advanced, Event, OnEvent, ShardFinished
from .executors import Executed, Executor, Order
from .memory_budget import peak_bytes
from .output_target import Target
from .prepare import Run

if TYPE_CHECKING:
    from ..planning.plan import ConversionPlan


def run_whole(
    plan: ConversionPlan, target: Target, executor: Executor, order: Callable[[], Order], *, on_event: OnEvent
) -> Report:
    """Carry a plan out and return what was done; `order` is called where there is something to do, and takes the memory."""
    done = None if target.overwrite else complete_already(plan, target.root, on_event)
    if done is not None:
        return done if target.push_to is None else replace(done, published=push(target.root, target.push_to).url)
    uploads = None
    if target.push_to is not None:
        publisher = Publisher(target.root, target.push_to)
        publisher.open()
        published = published_report(publisher)
        if target.discard and published.get("plan") == plan.digest:
            return finished_report(plan, target.root, published, peak_memory=peak_bytes())
        publisher.refuse_foreign()
        uploads = Uploads(publisher, discard=target.discard)
    return make_output(order(), target.root, executor, overwrite=target.overwrite, on_event=on_event, uploads=uploads)


def complete_already(plan: ConversionPlan, root: Path, on_event: OnEvent) -> Report | None:
    """Return the report of an output that an earlier run completed, every file checked; None where there is none."""
    finished = finished_by(plan, root, lambda: on_event(Advanced(0)))
    return None if finished is None else finished_report(plan, root, finished, peak_memory=peak_bytes())


def make_output(
    order: Order,
    destination: Path,
    executor: Executor,
    *,
    on_event: OnEvent,
    overwrite: bool = False,
    complete: bool = False,
    uploads: Uploads | None = None,
) -> Report:
    """Do the work of a run and return its report; `complete`: no shard may be left to make."""
    plan, claim, poll = order.run.plan, OutputClaim.of(order.run.plan), partial(on_event, Advanced(0))
    if uploads is not None:
        uploaded = {file.name: file.sha256 for file in uploads.uploaded.values()}
        claim = replace(claim, uploaded=uploaded, at_once=SHARDS_AT_ONCE if uploads.discard else None)
    old_card = source_card(plan.checkpoint.source)
    with open_destination(destination, claim, overwrite=overwrite, complete=complete, poll=poll) as out:
        resumed = len(out.done)
        with uploading(uploads):
            tell = on_event if uploads is None else _feeding(uploads, out, on_event)
            executed = executor.execute(order, out, tell)
            if uploads is not None:
                uploads.finish(poll)
        statistics = gather(out.done.values())
        card = card_text(plan, statistics, card_metadata(plan, old_card), old_card)
        sums = finish(plan, out, statistics, card, gone=uploads.gone if uploads is not None else ())
        report = _report(order.run, out, executed, resumed)
        if uploads is not None:
            report = replace(report, published=uploads.commit(out.done.values(), sums).url)
    if uploads is not None and uploads.discard:
        abandon(destination, claim, existed=False)
    return report


def _feeding(uploads: Uploads, out: Destination, on_event: OnEvent) -> OnEvent:
    """Start uploading, and return what is to be called with the run's events: it hands on every finished shard."""
    out.before_shard, out.has_room, out.one_by_one = uploads.wait_for_room, uploads.has_room, uploads.discard
    uploads.begin()

    def feed(event: Event) -> None:
        if isinstance(event, ShardFinished):
            uploads.add(out.done[event.name])
        try:
            on_event(event)
        except BaseException:
            uploads.stop()
            raise

    return feed


def _report(run: Run, out: Destination, executed: Executed, resumed: int) -> Report:
    plan, statistics = run.plan, gather(out.done.values())
    seconds = time.monotonic() - run.begun
    wait = max(0.0, seconds * executed.workers - sum(executed.timings.values()))
    reports = pattern_reports(plan, statistics)
    return Report(
        source=str(plan.checkpoint.origin),
        destination=str(out.root),
        scheme=plan.scheme,
        formats=dict(plan.formats),
        method=plan.method_text,
        kernel=executed.kernel,
        device_reason=executed.reason,
        source_bytes=plan.checkpoint.tensor_bytes,
        output_bytes=plan.tensor_bytes,
        tensors=sum(shard.tensors for shard in plan.shards),
        quantized=sum(1 for _ in plan.weights()) + len(plan.carried.weights),
        kept=sum(not item.decision.quantize for item in plan.selection.tensors),
        relative_error=total_error(statistics),
        patterns=reports,
        warnings=plan.warnings + suspicions(reports, calibrated=plan.statistics_bytes > 0),
        resumed_shards=resumed,
        seconds=seconds,
        peak_memory=peak_bytes(),
        timings={**executed.timings, "wait": wait},
        left_out=plan.checkpoint.left_out,
        fetched_bytes=plan.checkpoint.source.fetched_bytes,
        unchecked_files=_unchecked(plan, resumed),
        smoothed=plan.smoothing.weights if plan.smoothing is not None else 0,
    )


def _unchecked(plan: ConversionPlan, resumed: int) -> int:
    """Return how many files of a remote source were read in this run and not compared with their digests."""
    source = plan.checkpoint.source
    checked = sum(shard.name in source.checked_files for shard in plan.shards)
    return max(0, len(plan.shards) - resumed - checked) if source.is_remote else 0
