"""Define the commands of `mfptq calibration`: show, merge and extract calibration files.

Thin: each calls one function of the library.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import click

from ..names.bridge import SCALE_KINDS
from .groups import Commands
from .options import json_option

_OUTPUT = click.option("--output", type=click.Path(path_type=Path), required=True, help="The file to write.")
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")


@click.group(cls=Commands)
def calibration() -> None:
    """Show, merge and extract calibration files.

    Example: mfptq calibration show qwen.calibration.safetensors
    """


@calibration.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@_OUTPUT
@_OVERWRITE
def merge(files: tuple[Path, ...], output: Path, overwrite: bool) -> None:
    """Join calibration FILES of one model, made from different text.

    Example: mfptq calibration merge a.calibration.safetensors b.calibration.safetensors --output
    all.calibration.safetensors
    """
    from ..calibration.file import check_output
    from ..calibration.merge import merge_calibrations

    check_output(output, overwrite=overwrite)
    merge_calibrations(files, output)


@calibration.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def show(file: Path, as_json: bool) -> None:
    """Show how much text FILE stands for, and its outliers.

    Example: mfptq calibration show qwen.calibration.safetensors
    """
    from dataclasses import asdict

    from ..calibration.overview import overview
    from ..calibration.reading import load_calibration
    from .calibration_text import overview_text
    from .columns import fitted

    with closing(load_calibration(file)) as opened:
        found = overview(opened)
    click.echo(json.dumps(asdict(found)) if as_json else fitted(overview_text(found)))


@calibration.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@_OUTPUT
@click.option("--kind", type=click.Choice(SCALE_KINDS), help="What bare numbers are.")
@_OVERWRITE
def extract(checkpoint: Path, output: Path, kind: str | None, overwrite: bool) -> None:
    """Take the input ranges out of an NVFP4 CHECKPOINT of llm-compressor, AutoRound or ModelOpt.

    Example: mfptq calibration extract Qwen3.5-27B-NVFP4 --output qwen.calibration.safetensors
    """
    from ..calibration.extract import extract_scales
    from ..calibration.file import check_output

    check_output(output, overwrite=overwrite)
    extract_scales(checkpoint, output, kind)
