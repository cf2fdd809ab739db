"""Define the commands `convert`, `plan`, `inspect`, `verify` and `demo`, and turn every error into one line.

Thin: options become keywords of the library's functions. Data goes to stdout, everything else to stderr. Nothing heavy may
be imported before a command needs it.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .._version import __version__
from ..errors import MfptqError, UsageError, VerificationError, counted, quote
from ..execution.memory_budget import memory_errors
from .calibration import calibration
from .check import check as check_command
from .check import engine_option, judges, refuse_findings, refuse_unloadable
from .cluster import carry_out, check_part_options, cluster_options, executor_of, finish, shards_option, summary
from .groups import Commands
from .options import (
    decisions_of,
    file_options,
    format_options,
    links_option,
    resource_options,
    rule_options,
    source_options,
)
from .process import (
    LOG_LEVELS,
    STOPPED,
    Interrupted,
    deferred_signals,
    handle_signals,
    set_up_logging,
    tune_interpreter,
)
from .push import publish_options, push
from .recipe import recipe
from .report import compare, report

if TYPE_CHECKING:
    from ..planning.settings import Decisions

RESOURCES = ("max_memory", "max_workers", "device")


def run() -> None:
    """Run the command line; every error of ours is one line on stderr and its exit code."""
    tune_interpreter()
    if sys.stderr is None or not sys.stderr.isatty():  # huggingface_hub draws its bars into files too
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        handle_signals()
        with memory_errors():
            main.main(standalone_mode=False)
        if sys.stdout is None:
            _fail("the work is done, but stdout is closed", 5)
        sys.stdout.flush()
    except MfptqError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (Interrupted, click.Abort) as stop:
        _fail(STOPPED, getattr(stop, "exit_code", 130))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(5)
    except OSError as error:
        _fail(f"cannot write the output: {error.strerror}", 5)


def _fail(message: str, code: int) -> None:
    with suppress(OSError):  # the exit code tells, where stderr cannot
        click.echo(f"mfptq: error: {message}", err=True)
    sys.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mfptq")
@click.option("-v", "--verbose", is_flag=True, help="Say what is being done: the same as --log-level info.")
@click.option(
    "--log-level", type=click.Choice(LOG_LEVELS), help="Least level of the messages on stderr; default warning."
)
def main(verbose: bool, log_level: str | None) -> None:
    """Convert Hugging Face checkpoints to NVFP4 without building the model.

    Example: mfptq convert Qwen/Qwen3.5-27B Qwen3.5-27B-NVFP4
    """
    set_up_logging(log_level or ("info" if verbose else "warning"))


for command in (calibration, check_command, compare, finish, recipe, report):
    main.add_command(command)


@main.command()
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@source_options
@rule_options
@format_options
@file_options
@resource_options
@publish_options
@engine_option
@cluster_options
@shards_option
@click.option("--overwrite", is_flag=True, help="Discard an existing mfptq output and start over.")
@click.option("--dry-run", is_flag=True, help="Show the plan, check all that a run would need, and write nothing.")
@click.option("--timings", is_flag=True, help="Show where the time went.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
def convert(model: str, output: Path, **options: Any) -> None:
    """Convert MODEL (folder or Hub repo) into the folder OUTPUT; rerun to resume.

    Example: mfptq convert Qwen/Qwen3.5-27B Qwen3.5-27B-NVFP4 --max-memory 2GB
    """
    from ..conversion import plan as make_plan
    from ..output.publish import PushTarget
    from ..planning.size_target import with_errors_beside
    from . import text

    engine = options.pop("engine")
    resources = {name: options.pop(name) for name in RESOURCES}
    publishing = {name: options.pop(name) for name in ("push_to_hub", "private", "discard_output")}
    overwrite, dry_run, timings = (options.pop(name) for name in ("overwrite", "dry_run", "timings"))
    as_json, quiet = options.pop("as_json"), options.pop("quiet")
    part = check_part_options(options.pop("shards"), overwrite=overwrite, dry_run=dry_run, **publishing)
    executor, decisions = executor_of(options), with_errors_beside(decisions_of(options), output)
    if dry_run:
        shown = {**resources, "engine": engine, "as_json": as_json, "estimate": True}
        _show_plan(model, decisions, shown | {"output": output, "overwrite": overwrite, "executor": executor})
        return
    with ExitStack() as opened:
        show, check = opened.enter_context(text.progress(quiet=quiet)), opened.enter_context(deferred_signals())
        resources["on_event"] = lambda event: (check(), show(event))
        made = opened.enter_context(make_plan(model, **resources, **decisions))
        if not decisions.get("force"):
            refuse_unloadable(made, engine)
        repo, private, discard = publishing.values()
        keywords = {
            "overwrite": overwrite,
            "push_to": PushTarget(repo, private, token=decisions.get("token")) if repo else None,
            "discard_output": discard,
            "executor": executor,
        }
        report = carry_out(made, output, part, {**resources, **(keywords if part is None else {})})
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    elif not quiet:
        click.echo(summary(report, timings=timings))


def _show_plan(model: str, decisions: Decisions, shown: dict[str, Any]) -> None:
    """Print a plan, and whether a run of it would begin; `shown` are the resources and what the options ask of the text."""
    from ..checking import check_plan
    from ..execution.memory_budget import caller_bytes
    from ..execution.prepare import Measuring, Resources
    from ..execution.preview import preview
    from ..planner import make_plan
    from . import plan_text, text

    own = shown if shown.get("executor") is None else {**shown, "max_workers": None, "device": "cpu"}  # those of tasks
    resources = Resources(*(own[name] for name in RESOURCES))
    measuring = Measuring(resources, held=caller_bytes(), path=decisions.get("format_errors"))
    with closing(make_plan(model, measuring, **decisions)) as made:
        findings = check_plan(made, judges(shown["engine"]))
        view = preview(
            made, resources, shown.get("output"), overwrite=shown.get("overwrite", False), held=measuring.held
        )
        if shown["as_json"]:
            values = text.plan_values(made, view)
            click.echo(json.dumps({**values, "findings": [each.as_dict() for each in findings]}))
        else:
            click.echo(plan_text.rendered(made, view, findings, shown))
        if shown.get("output") is not None and not decisions.get("force"):
            refuse_findings(findings, shown["engine"])


@main.command()
@click.argument("model")
@source_options
@rule_options
@format_options
@file_options
@resource_options
@engine_option
@click.option("--explain", metavar="NAME", help="Say why one tensor gets what it gets.")
@click.option("--all", "every", is_flag=True, help="A line for every tensor.")
@click.option("--estimate/--no-estimate", default=True, help="Measure for half a second how long it will take.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def plan(model: str, **options: Any) -> None:
    """Show what converting MODEL would do, and write nothing.

    Example: mfptq plan Qwen/Qwen3.5-27B --ignore 're:.*linear_attn.*'
    """
    names = (*RESOURCES, "engine", "explain", "every", "estimate", "as_json")
    shown = {name: options.pop(name) for name in names}
    _show_plan(model, decisions_of(options), shown)


@main.command()
@click.argument("path")
@source_options
@links_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(path: str, as_json: bool, **options: Any) -> None:
    """Show what the checkpoint PATH (folder or Hub repo) holds, from headers alone.

    Example: mfptq inspect ./Qwen3.5-27B-NVFP4
    """
    from dataclasses import asdict

    from ..inspection import inspect as look
    from . import text

    found = look(path, **options)
    click.echo(json.dumps(asdict(found)) if as_json else text.inspection_text(found))


@main.command()
@click.argument("output")
@click.option("--source", help="What it was made from: folder or Hub repo.")
@source_options
@links_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def verify(output: str, source: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Check a converted checkpoint; exit code 6 if anything is wrong.

    Example: mfptq verify Qwen3.5-27B-NVFP4 --source Qwen/Qwen3.5-27B
    """
    from dataclasses import asdict

    from ..output.leftovers import REPORT
    from ..storage.files import expanded
    from ..verification import verify as check
    from . import text

    with text.progress(quiet=quiet, what="verify") as show, deferred_signals() as stop:
        found = check(output, source, on_event=lambda event: (stop(), show(event)), **options)
    click.echo(json.dumps({**asdict(found), "ok": found.ok}) if as_json else text.verification_text(found))
    if not found.ok:
        faults = counted(len(found.faults), "fault", "faults")
        foreign = (
            ""
            if (expanded(output) / REPORT).is_file()
            else "; without mfptq_report.json it is no output of mfptq: use check"
        )
        raise VerificationError(f"{quote(output)} has {faults}: {found.faults[0]}{foreign}")


@main.command()
@click.argument("output", type=click.Path(path_type=Path))
def demo(output: Path) -> None:
    """Make a small Qwen3.5-shaped checkpoint, convert and verify it, in the new folder OUTPUT.

    Example: mfptq demo ./mfptq-demo
    """
    from ..conversion import convert as run_conversion
    from ..demo import DemoShape, write_demo
    from ..verification import verify as check
    from . import text

    if output.exists() and any(output.iterdir()):
        raise UsageError(f"{quote(output)} is not empty: name a new folder")
    for name, shape in (("dense", DemoShape()), ("experts", DemoShape(experts=4, intermediate=128))):
        source, target = output / name, output / f"{name}-NVFP4"
        write_demo(source, shape)
        with text.progress(quiet=False) as show, deferred_signals() as stop:
            report = run_conversion(source, target, on_event=lambda event: (stop(), show(event)))
        click.echo(text.summary(report, timings=False, serve=False))
        found = check(target, source)
        click.echo(text.verification_text(found) + "\n")
        if not found.ok:
            raise VerificationError(str(found.faults[0]))
    click.echo(text.after_demo(output))


from .calibrate import calibrate  # noqa: E402 - imports nothing but click
from .evaluate import evaluate  # noqa: E402
from .repair import repair  # noqa: E402

main.add_command(calibrate)
main.add_command(push)
main.add_command(repair)
main.add_command(evaluate)
