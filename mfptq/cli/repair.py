"""Define `mfptq repair`, which writes an NVFP4 checkpoint again, with what engines need and what it lacks.

It is a conversion whose choice of layers is the checkpoint's own: codes go over, scales of fused partners are made equal, and
config.json, index, card and digests are written anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .options import json_option, overwrite_option, quiet_option
from .progress import progress


@click.command()
@click.argument("checkpoint", type=click.Path())
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--source", help="What it was made from, folder or Hub repo: its weights are quantized anew.")
@click.option("--max-memory", default="1GiB", show_default=True, help="Ceiling for the whole process.")
@click.option("--max-workers", type=int, help="Threads; by default one for each core.")
@overwrite_option
@json_option
@quiet_option
def repair(checkpoint: str, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write the NVFP4 CHECKPOINT (a folder, of any tool) again into OUTPUT, as engines load it and compute right.

    Fused partners get one global scale, modules that are not quantized get their `ignore` entries, and names become those
    of compressed-tensors. No weight is quantized anew, except with --source: then the choice of layers and the input
    scales are CHECKPOINT's, weights and files the source's, also those that CHECKPOINT lost.

    Example: mfptq repair ./Qwen3.5-27B-NVFP4 ./Qwen3.5-27B-NVFP4-repaired
    """
    from ..conversion import convert
    from . import text

    with progress(quiet=quiet) as options["on_event"]:
        report = convert(options.pop("source") or checkpoint, output, like=checkpoint, **options)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    elif not quiet:
        click.echo(text.summary(report, timings=False))
