"""Define `mfptq calibrate`, and show how far it is.

Thin: options become keywords of `mfptq.calibrate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import counted
from .cluster import cluster_options, executor_of
from .download_lines import download_lines
from .options import forward_options, source_options
from .process import deferred_signals

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
@click.option("--overwrite", is_flag=True, help="Discard an existing output and start over.")
@source_options
@cluster_options
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
def calibrate(model: str, dataset: Path, output: Path, **options: Any) -> None:
    """Run MODEL (folder or Hub repo) over text and record what reaches its linear layers; rerun to resume.

    Example: mfptq calibrate Qwen/Qwen3.5-27B --dataset chats.jsonl --output qwen.calibration.safetensors
    """
    from ..observation.models import require_extra

    require_extra()  # before the next import, which needs torch
    from ..observation.calibrate import calibrate as run_calibration

    quiet, options["executor"] = options.pop("quiet"), executor_of(options)
    with _progress(output, quiet=quiet) as show, deferred_signals() as check, download_lines(quiet=quiet):
        done = run_calibration(model, dataset, output, on_event=lambda event: (check(), show(event)), **options)
    if not quiet:
        click.echo(f"{output}: {done.statistics} over {counted(done.samples, 'sample', 'samples')} of {done.model}")


@contextmanager
def _progress(output: Path, *, quiet: bool) -> Iterator[Callable[[CalibrationProgress], None]]:
    """Lend a callback that moves a bar; a run that stops early says how much is in the file."""
    import os
    import sys

    from tqdm import tqdm

    disabled = quiet or not sys.stderr.isatty() or bool(os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"))
    latest: list[CalibrationProgress] = []
    with tqdm(unit="block", disable=disabled, desc="calibrate", leave=False) as bar:

        def show(event: CalibrationProgress) -> None:
            latest[:] = [event]
            bar.total = event.total_steps
            bar.update(event.steps - bar.n)
            bar.set_postfix_str(f"{event.samples}/{event.requested} samples kept", refresh=False)

        try:
            yield show
        finally:
            if latest and latest[0].samples < latest[0].requested:
                bar.clear()
                _say_what_is_kept(output, latest[0].requested)


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
