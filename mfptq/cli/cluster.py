"""Define `mfptq finish`, the options of a cluster, and what `convert` does when it makes a part of an output.

Called by `main`, `convert` and `calibrate`. Thin; imports nothing heavy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError, counted
from .options import decision_options, decisions_of, json_option, quiet_option, together
from .progress import progress

if TYPE_CHECKING:
    from ..cluster.ray_executor import RayExecutor
    from ..execution.partial_run import PartReport
    from ..planning.parts import Part


shards_option = click.option(
    "--shards", metavar="I/N", help="Make only part I of N, on any machine; then: mfptq finish."
)


cluster_options = together(
    click.option(
        "--executor",
        type=click.Choice(("threads", "ray")),
        default="threads",
        show_default=True,
        help="What does the work: threads of this process, or a Ray cluster that is running.",
    ),
    click.option(
        "--ray-address", help="With ray: the head's address; by default RAY_ADDRESS, or this machine's cluster."
    ),
    click.option("--nodes-max", type=int, help="With ray: take no more than so many nodes' worth of tasks at a time."),
    click.option("--cpus-per-task", type=int, help="With ray: cores of each task; 4 by default."),
    click.option("--gpus-per-task", type=int, help="With ray: GPUs of each task."),
)


def executor_of(options: dict[str, Any]) -> RayExecutor | None:
    """Return the executor that options name, None for threads."""
    name = options.pop("executor")
    keywords = {"address": "ray_address", "max_nodes": "nodes_max"}
    keywords |= {each: each for each in ("cpus_per_task", "gpus_per_task")}
    given = {keyword: value for keyword, option in keywords.items() if (value := options.pop(option)) is not None}
    if name == "ray":
        from ..cluster.ray_executor import RayExecutor

        return RayExecutor(**given)
    if given:
        raise UsageError(f"--{keywords[next(iter(given))].replace('_', '-')} says nothing without --executor ray")
    return None


def check_part_options(
    shards: str | None, *, overwrite: bool, dry_run: bool, executor: str, **publishing: object
) -> Part | None:
    """Return the part that --shards names, None without it."""
    if shards is None:
        return None
    from ..planning.parts import Part

    if overwrite:
        raise UsageError("--overwrite and --shards do not go together: remove the output before the first part begins")
    if executor != "threads":
        raise UsageError("a part is made by this machine: leave out --executor, or leave out --shards to use a cluster")
    if any(publishing.values()):
        raise UsageError("a part is not published: leave out --shards, or publish the finished output with mfptq push")
    if dry_run:
        raise UsageError("--dry-run shows the whole plan, which all parts share: leave out --shards")
    return Part.parse(shards)


def part_text(report: PartReport) -> str:
    """Return what a part has made, and what comes after it."""
    from ..sizes import size_text

    made = f"{len(report.shards)} of {counted(report.all_shards, 'shard', 'shards')}"
    if report.resumed:
        made += f", {report.resumed} of them finished before and checked by content"
    return (
        f"{report.source} -> {report.destination}\n  {made}\n"
        f"  {size_text(report.source_bytes)} -> {size_text(report.output_bytes)}, kernel {report.kernel}, "
        f"{report.seconds:.1f} s, peak memory {size_text(report.peak_memory)}\n"
        "  when all parts are done: mfptq finish, with the same model, output and options"
    )


@click.command()
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@decision_options
@json_option
@quiet_option
def finish(model: str, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Complete OUTPUT, whose parts `convert --shards` has made of MODEL: check each shard, config.json last.

    Takes the options that the parts were made with, but for --shards.

    Example: mfptq finish Qwen/Qwen3.5-27B Qwen3.5-27B-NVFP4
    """
    from ..conversion import plan
    from ..planning.size_target import with_errors_beside
    from . import text

    decisions = with_errors_beside(decisions_of(options), output)
    with plan(model, **decisions) as made, progress(quiet=quiet) as on_event:
        report = made.finish(output, on_event=on_event)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    elif not quiet:
        click.echo(text.summary(report, timings=False))
