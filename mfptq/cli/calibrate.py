"""Define `mfptq calibrate`; a run that stops early says what is kept.

Thin: options become keywords of `mfptq.calibrate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import counted
from .cluster import cluster_options, executor_of
from .options import forward_options, overwrite_option, quiet_option, source_options
from .progress import block_progress

if TYPE_CHECKING:
    from ..observation.calibration_pass import CalibrationProgress


@click.command()
@click.argument("model")
@click.option(
    "--dataset",
    required=True,
    type=click.Path(path_type=Path),
    help="JSONL, parquet or text file, or OWNER/NAME:SPLIT on the Hub.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="File, *.calibration.safetensors.")
@click.option("--samples", default=256, show_default=True, help="How many samples to run.")
@click.option("--max-seq-length", default=4096, show_default=True, help="Tokens of a sample that are read.")
@click.option("--batch-size", type=int, help="Samples between two writes; by default what memory allows.")
@click.option(
    "--statistics",
    type=click.Choice(["amax", "moments", "hessian", "factors"]),
    default="hessian",
    show_default=True,
    help="What to record; each includes the ones before. factors makes gptq possible.",
)
@forward_options
@click.option("--all-experts/--routed-experts", default=True, show_default=True, help="Which tokens an expert sees.")
@click.option("--sensitivities", is_flag=True, help="Also measure how much each layer matters, for --target-bits.")
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Leave out: a module name, or re:REGEX.")
@click.option("--target", "targets", multiple=True, metavar="PATTERN", help="Include what a default keeps.")
@overwrite_option
@source_options
@cluster_options
@quiet_option
def calibrate(model: str, dataset: Path, output: Path, **options: Any) -> None:
    """Run MODEL (folder or Hub repo) over text and record what reaches its linear layers; rerun to resume.

    Example: mfptq calibrate Qwen/Qwen3.5-27B --dataset chats.jsonl --output qwen.calibration.safetensors
    """
    from ..observation.models import require_extra

    require_extra()  # before the next import, which needs torch
    from ..observation.calibrate import calibrate as run_calibration

    quiet, options["executor"] = options.pop("quiet"), executor_of(options)
    latest: CalibrationProgress | None = None
    try:
        with block_progress("calibrate", quiet=quiet) as show:

            def tell(event: CalibrationProgress) -> None:
                nonlocal latest
                latest = event
                show(event.steps, event.total_steps, f"{event.samples}/{event.requested} samples kept")

            done = run_calibration(model, dataset, output, on_event=tell, **options)
    finally:
        if latest and latest.samples < latest.requested:
            _say_what_is_kept(output, latest.requested)
    if not quiet:
        click.echo(f"{output}: {done.statistics} over {counted(done.samples, 'sample', 'samples')} of {done.model}")


def _say_what_is_kept(output: Path, requested: int) -> None:
    """Ask the files themselves: a signal can come between their writing and the report of it."""
    from ..observation.calibration_parts import description_of, parts_of, samples_kept

    found, kept, place = description_of(output), samples_kept(output), parts_of(output)
    if not kept and found is not None and found.requested == requested:
        kept, place = found.samples, output
    if not kept:
        click.echo(f"mfptq: no batch was finished, 0 of {requested} samples are kept", err=True)
    else:
        text = f"{kept} of {requested} samples are kept in {place}"
        click.echo(f"mfptq: {text}: rerun the same command to go on", err=True)
