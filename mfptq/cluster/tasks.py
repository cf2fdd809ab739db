"""Do a node's work in a cluster: look whether it can take part, make shards, and make a part of a calibration.

Called by `cluster.ray_executor` and `cluster.calibrating` through the cluster, in a process of the node. Takes and returns
plain values: what another process raises does not always survive the way back. The node plans by itself, from headers, and
compares digests.
"""

from __future__ import annotations

import os
import pickle
import platform
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import DestinationError, MfptqError, PlanMismatchError, quote
from ..execution.events import ignore
from ..execution.executors import Request
from ..execution.memory_budget import caller_bytes, memory_errors
from ..execution.prepare import Resources, prepare
from .progress import progress_note

if TYPE_CHECKING:
    from ..observation.calibration_pass import Share
    from ..output.journal import ShardResult
    from ..planning.plan import ConversionPlan

Answer = dict[str, Any]
_HELD = caller_bytes()  # by the cluster's own libraries, before anything of ours
_kept: dict[bytes, ConversionPlan] = {}  # the plan of the last task, since a process makes many shards of one plan


def _plan(request: bytes) -> ConversionPlan:
    """Return the plan, which is kept open for the next task, until one asks for another."""
    from ..planner import make_plan

    if request not in _kept:
        for plan in list(_kept.values()):
            _forget(plan)
        asked: Request = pickle.loads(request)  # noqa: S301 - written by our own driver, through the cluster
        _kept[request] = make_plan(asked.source, **asked.decisions)
    return _kept[request]


def checked_plan(request: bytes, digests: Mapping[str, str]) -> ConversionPlan:
    """Return the plan as this node reads it, or raise PlanMismatchError if it is not the driver's."""
    plan = _plan(request)
    try:
        _check_digests(plan, digests)
    except PlanMismatchError:
        _forget(plan)
        raise
    return plan


def _check_digests(plan: ConversionPlan, digests: Mapping[str, str]) -> None:
    changed = [name for name in {**plan.digests, **digests} if plan.digests.get(name) != digests.get(name)]
    if changed:
        raise PlanMismatchError(
            f"{' and '.join(changed)} as read there differ: give all nodes the same files and versions of mfptq"
        )


def _forget(plan: ConversionPlan) -> None:
    """Close a plan, so that the next task makes it anew."""
    _kept.clear()
    plan.close()


def _answer(found: Mapping[str, Any]) -> Answer:
    return {"ok": True, "node": platform.node(), **found}


def _failure(error: MfptqError) -> Answer:
    return {"ok": False, "node": platform.node(), "error": type(error).__name__, "message": str(error)}


def probe(request: bytes, digests: Mapping[str, str], destination: str, token: str) -> Answer:
    """Return whether this node has our version, reads the same plan, and shares the destination's folder of the driver.

    `token` names a file that the driver has written into `destination`; this node writes another for the driver to see.
    """
    try:
        with memory_errors():
            checked_plan(request, digests)
        seen = Path(destination) / token
        if not seen.exists():
            raise DestinationError(f"output {quote(destination)} is not the driver's folder: it must be shared")
        try:
            seen.with_name(f"{token}.{os.getpid()}").touch()
        except OSError as error:
            raise DestinationError(f"cannot write into {quote(destination)}: {error.strerror}") from None
    except MfptqError as error:
        return _failure(error)
    return _answer({"version": __version__, "seen": f"{token}.{os.getpid()}"})


def make(request: bytes, digests: Mapping[str, str], destination: str, order: Mapping[str, Any]) -> Answer:
    """Make the shards that `order["shards"]` names, with `order["resources"]`, and return what became of each."""
    from ..execution.partial_run import run_shards

    done: dict[str, ShardResult] = {}
    begun = time.monotonic()
    try:
        with memory_errors():
            plan = checked_plan(request, digests)
            run = prepare(plan, Resources(**order["resources"]), _HELD)
            shards = tuple(shard for shard in plan.shards if shard.name in order["shards"])
            try:
                report = run_shards(run, Path(destination), shards, ignore, on_done=done.update)
            except BaseException:
                _forget(plan)  # its source may have been told to stop reading
                raise
    except MfptqError as error:
        return _failure(error)
    return _answer({
        "results": [asdict(result) for result in done.values()],
        "kernel": report.kernel,
        "seconds": time.monotonic() - begun,
        "peak_memory": report.peak_memory,
    })  # fmt: skip


def calibrate_part(
    request: bytes, digests: Mapping[str, str], job: Mapping[str, Any], options: Mapping[str, Any]
) -> Answer:
    """Make the part of a calibration that `job` names, or go on with it; `options` are those of the pass."""
    from ..observation.models import check_device, quiet_transformers, require_extra

    path, begun = Path(job["path"]), time.monotonic()
    try:
        require_extra()
        from ..observation.calibration_pass import CalibrationOptions, run_pass

        _use_threads(options["threads"])
        made = CalibrationOptions(**{name: value for name, value in options.items() if name != "threads"})
        check_device(made.device)
        with memory_errors(), quiet_transformers(), closing(_plan_of_files(request)) as plan:
            _check_digests(plan, digests)
            share: Share = pickle.loads(job["share"])  # noqa: S301 - written by our own driver, through the cluster
            run_pass(plan, share, path, made, on_event=progress_note(path))
    except MfptqError as error:
        return _failure(error)
    return _answer({"part": path.name, "seconds": time.monotonic() - begun})


def _plan_of_files(request: bytes) -> ConversionPlan:
    """Return the plan of a source whose files are all here: transformers reads no ranges."""
    from ..planner import make_plan

    asked: Request = pickle.loads(request)  # noqa: S301 - written by our own driver, through the cluster
    return make_plan(asked.source, **asked.decisions, keep_source=True)


def _use_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)
