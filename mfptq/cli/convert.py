"""Define `mfptq convert` and `mfptq plan`: options become keywords of `mfptq.plan`, and what comes back is shown.

Called by `main`. Nothing heavy may be imported before a command needs it.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .check import engine_option, judges, refuse_findings, refuse_unloadable
from .cluster import check_part_options, cluster_options, executor_of, part_text, shards_option
from .options import decision_options, decisions_of, json_option, overwrite_option, quiet_option, resource_options
from .progress import progress
from .push import publish_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..execution.executors import Executor
    from ..execution.output_target import Target
    from ..execution.partial_run import PartReport
    from ..output.report import Report
    from ..planning.settings import Decisions

RESOURCES = ("max_memory", "max_workers", "device")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the options ask of a plan that is shown: for which engine, how much of it, and for which run, if any."""

    resources: Mapping[str, Any]
    engine: str
    as_json: bool
    explain: str | None = None
    every: bool = False
    estimate: bool = True
    target: Target | None = None
    executor: Executor | None = None


@click.command()
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@decision_options
@resource_options
@publish_options
@engine_option
@cluster_options
@shards_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Show the plan, check all that a run would need, and write nothing.")
@click.option("--timings", is_flag=True, help="Show where the time went.")
@json_option
@quiet_option
def convert(model: str, output: Path, **options: Any) -> None:
    """Convert MODEL (folder or Hub repo) into the folder OUTPUT; rerun to resume.

    Example: mfptq convert Qwen/Qwen3.5-27B Qwen3.5-27B-NVFP4 --max-memory 2GB
    """
    from ..conversion import plan as make_plan
    from ..execution.output_target import Target
    from ..execution.partial_run import PartReport
    from ..output.publish import PushTarget
    from ..planning.size_target import with_errors_beside
    from ..storage.files import expanded
    from . import text

    engine = options.pop("engine")
    resources = {name: options.pop(name) for name in RESOURCES}
    publishing = {name: options.pop(name) for name in ("push_to_hub", "private", "discard_output")}
    overwrite, dry_run, timings = (options.pop(name) for name in ("overwrite", "dry_run", "timings"))
    as_json, quiet = options.pop("as_json"), options.pop("quiet")
    unfit = {"overwrite": overwrite, "dry_run": dry_run, "executor": options["executor"], **publishing}
    part = check_part_options(options.pop("shards"), **unfit)
    executor, decisions = executor_of(options), with_errors_beside(decisions_of(options), output)
    repo, private, discard = publishing.values()
    push_to = PushTarget(repo, private, token=decisions.get("token")) if repo else None
    if dry_run:
        target = Target(expanded(output), overwrite=overwrite, push_to=push_to, discard=discard)
        _show_plan(model, decisions, _Asked(resources, engine, as_json, target=target, executor=executor))
        return
    with progress(quiet=quiet) as resources["on_event"], make_plan(model, **resources, **decisions) as made:
        if not decisions.get("force"):
            refuse_unloadable(made, engine)
        report: Report | PartReport
        if part is not None:
            report = made.run_part(output, part, **resources)
        else:
            resources |= {"overwrite": overwrite, "push_to": push_to, "discard_output": discard, "executor": executor}
            report = made.run(output, **resources)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    elif not quiet:
        done = part_text(report) if isinstance(report, PartReport) else text.summary(report, timings=timings)
        click.echo(done)


def _show_plan(model: str, decisions: Decisions, asked: _Asked) -> None:
    """Print a plan, or one tensor of it explained; with a target also whether a run would begin."""
    from ..checking import check_plan
    from ..execution.memory_budget import caller_bytes
    from ..execution.prepare import Measuring, Resources
    from ..execution.preview import Estimates, preview
    from ..planner import make_plan
    from . import text
    from .columns import width
    from .explain_text import explain_text
    from .plan_text import plan_text

    resources = Resources(**asked.resources)
    if asked.executor is not None:
        resources = Resources(resources.max_memory)  # threads and device are those of the tasks
    measuring = Measuring(resources, held=caller_bytes(), path=decisions.get("format_errors"))
    with closing(make_plan(model, measuring, **decisions)) as made:
        findings = check_plan(made, judges(asked.engine))
        estimate = asked.estimate and not (asked.as_json or asked.explain)
        estimates = Estimates(computing=estimate, fetching=estimate and asked.target is not None)
        view = preview(made, resources, asked.target, held=measuring.held, estimates=estimates)
        if asked.as_json:
            values = text.plan_values(made, view)
            click.echo(json.dumps({**values, "findings": [each.as_dict() for each in findings]}))
        elif asked.explain:
            click.echo(explain_text(made, asked.explain, findings, width()))
        else:
            click.echo(plan_text(made, view, findings, columns=width(), every=asked.every))
        if asked.target is not None and not decisions.get("force"):
            refuse_findings(findings, asked.engine)


@click.command()
@click.argument("model")
@decision_options
@resource_options
@engine_option
@click.option("--explain", metavar="NAME", help="Say why one tensor is quantized or kept, and how.")
@click.option("--all", "every", is_flag=True, help="A line for every tensor.")
@click.option("--estimate/--no-estimate", default=True, help="Measure for half a second how long it will take.")
@json_option
def plan(model: str, **options: Any) -> None:
    """Show what converting MODEL would do, and write nothing.

    Example: mfptq plan Qwen/Qwen3.5-27B --ignore 're:.*linear_attn.*'
    """
    resources = {name: options.pop(name) for name in RESOURCES}
    asked = {name: options.pop(name) for name in ("engine", "as_json", "explain", "every", "estimate")}
    _show_plan(model, decisions_of(options), _Asked(resources, **asked))
