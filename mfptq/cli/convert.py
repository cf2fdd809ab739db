"""Define `mfptq convert` and `mfptq plan`: options become keywords of `mfptq.plan`, and what comes back is shown.

Called by `main`. Nothing heavy may be imported before a command needs it.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .check import engine_option, judges, refuse_findings, refuse_unloadable
from .cluster import carry_out, check_part_options, cluster_options, executor_of, shards_option, summary
from .options import decision_options, decisions_of, json_option, overwrite_option, quiet_option, resource_options
from .progress import progress
from .push import publish_options

if TYPE_CHECKING:
    from ..planning.settings import Decisions

RESOURCES = ("max_memory", "max_workers", "device")


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
    from ..output.publish import PushTarget
    from ..planning.size_target import with_errors_beside
    from ..storage.files import expanded

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
        shown = {**resources, "engine": engine, "as_json": as_json, "estimate": True}
        _show_plan(model, decisions, shown | {"target": target, "executor": executor})
        return
    with progress(quiet=quiet) as resources["on_event"], make_plan(model, **resources, **decisions) as made:
        if not decisions.get("force"):
            refuse_unloadable(made, engine)
        if part is None:
            resources |= {"overwrite": overwrite, "push_to": push_to, "discard_output": discard, "executor": executor}
        report = carry_out(made, output, part, resources)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    elif not quiet:
        click.echo(summary(report, timings=timings))


def _show_plan(model: str, decisions: Decisions, shown: dict[str, Any]) -> None:
    """Print a plan, and whether a run of it would begin; `shown` are the resources and what the options ask of the text."""
    from ..checking import check_plan
    from ..execution.memory_budget import caller_bytes
    from ..execution.prepare import Measuring, Resources
    from ..execution.preview import Timed, preview
    from ..planner import make_plan
    from . import plan_text, text

    own = shown if shown.get("executor") is None else {**shown, "max_workers": None, "device": "cpu"}  # those of tasks
    resources = Resources(*(own[name] for name in RESOURCES))
    measuring = Measuring(resources, held=caller_bytes(), path=decisions.get("format_errors"))
    with closing(make_plan(model, measuring, **decisions)) as made:
        findings = check_plan(made, judges(shown["engine"]))
        target, estimate = shown.get("target"), shown["estimate"] and not (shown["as_json"] or shown.get("explain"))
        timed = Timed(computing=estimate, fetching=estimate and target is not None)
        view = preview(made, resources, target, held=measuring.held, timed=timed)
        if shown["as_json"]:
            values = text.plan_values(made, view)
            click.echo(json.dumps({**values, "findings": [each.as_dict() for each in findings]}))
        else:
            click.echo(plan_text.rendered(made, view, findings, shown))
        if target is not None and not decisions.get("force"):
            refuse_findings(findings, shown["engine"])


@click.command()
@click.argument("model")
@decision_options
@resource_options
@engine_option
@click.option("--explain", metavar="NAME", help="Say why one tensor gets what it gets.")
@click.option("--all", "every", is_flag=True, help="A line for every tensor.")
@click.option("--estimate/--no-estimate", default=True, help="Measure for half a second how long it will take.")
@json_option
def plan(model: str, **options: Any) -> None:
    """Show what converting MODEL would do, and write nothing.

    Example: mfptq plan Qwen/Qwen3.5-27B --ignore 're:.*linear_attn.*'
    """
    names = (*RESOURCES, "engine", "explain", "every", "estimate", "as_json")
    shown = {name: options.pop(name) for name in names}
    _show_plan(model, decisions_of(options), shown)
