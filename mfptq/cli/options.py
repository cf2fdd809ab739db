"""Options that several commands share, as decorators, and what they decide. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import click

from ..errors import UsageError
from ..names.bridge import ScaleKind

if TYPE_CHECKING:
    from ..planning.settings import Decisions

Function = TypeVar("Function", bound=Callable[..., Any])


def source_options(function: Function) -> Function:
    """Add what says where on the Hub a checkpoint is."""
    for option in (
        click.option("--cache-dir", type=click.Path(path_type=Path), help="Folder of the Hub's cache."),
        click.option("--token", help="Hub token; HF_TOKEN and a stored login work too."),
        click.option("--revision", help="Branch, tag or commit on the Hub."),
    ):
        function = option(function)
    return function


def forward_options(function: Function) -> Function:
    """Add what says how a model is run over text."""
    for option in (
        click.option("--max-memory", help="Ceiling for the process; a larger model is read block by block."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "bfloat16", "float32"]),
            default="auto",
            show_default=True,
            help="To compute in; float32 is faster on CPUs without bfloat16.",
        ),
        click.option("--device", default="cpu", show_default=True, help="cpu, or a torch device such as cuda:0."),
    ):
        function = option(function)
    return function


def rule_options(function: Function) -> Function:
    """Add what decides the output's content."""
    for option in (
        click.option(
            "--input-scales-kind",
            type=click.Choice(get_args(ScaleKind)),
            help="What the numbers of --input-scales are.",
        ),
        click.option(
            "--smooth/--no-smooth",
            default=None,
            help="With --calibration: scale outlier channels of the inputs into the weights. By default for W4A4 by --method auto.",
        ),
        click.option("--input-margin", type=float, help="Widens the ranges of --calibration; by default 4, minmax 1."),
        click.option(
            "--input-scales",
            type=click.Path(),
            help="JSON, safetensors, checkpoint folder or Hub repo, or auto (no calibration): makes W4A4.",
        ),
        click.option(
            "--like",
            type=click.Path(),
            help="A checkpoint in NVFP4 or FP8, folder or Hub repo: its choice of layers, its input scales.",
        ),
        click.option("--calibration", type=click.Path(), help="A calibration file: W4A4, and better weights."),
        click.option("--force", is_flag=True, help="Quantize even what no engine is known to load in FP4."),
        click.option("--no-default-ignore", is_flag=True, help="Drop the default exclusions."),
        click.option("--target", "targets", multiple=True, metavar="PATTERN", help="Quantize what a default keeps."),
        click.option("--ignore", multiple=True, metavar="PATTERN", help="Keep: a module name, or re:REGEX."),
        click.option(
            "--method",
            help="search (least error of weights), minmax (rounding); with --calibration also weighted, hessian, "
            "hessian+, gptq (least error of outputs), or auto, its default: the strongest that the file allows.",
        ),
        click.option(
            "--scheme", help="NVFP4 (W4A4) or NVFP4A16 (W4A16); by default W4A4 where input scales are given."
        ),
    ):
        function = option(function)
    return function


links_option = click.option(
    "--follow-links",
    is_flag=True,
    help="Read files that are links out of the source's folder; only where you trust it.",
)


def file_options(function: Function) -> Function:
    """Add what says which files of the source are read, and how."""
    for option in (
        links_option,
        click.option(
            "--keep-source", is_flag=True, help="Download a Hub repo whole into its cache, and keep it there."
        ),
        click.option(
            "--skip-file",
            "skip_files",
            multiple=True,
            metavar="NAME",
            help="Leave out a safetensors file that no index names.",
        ),
        click.option(
            "--include-file",
            "include_files",
            multiple=True,
            metavar="NAME",
            help="Take in a safetensors file that no index names.",
        ),
    ):
        function = option(function)
    return function


def target_options(function: Function) -> Function:
    """Add the options of a size to aim at."""
    for option in (
        click.option(
            "--format-errors",
            type=click.Path(path_type=Path),
            help="A file that keeps the errors found for a target; convert has one beside OUTPUT.",
        ),
        click.option(
            "--target-format",
            "target_formats",
            multiple=True,
            metavar="FORMAT",
            help="What a target may give layers: fp8-dynamic, bf16; by default both.",
        ),
        click.option("--target-size", metavar="SIZE", help="The same for all safetensors files together, as 20GB."),
        click.option(
            "--target-bits",
            type=float,
            metavar="BITS",
            help="At most so many bits for a quantized weight, as 5.2: formats for the least predicted error of outputs.",
        ),
    ):
        function = option(function)
    return function


def format_options(function: Function) -> Function:
    """Add the options of formats, of recipes, and of a size to aim at."""
    function = target_options(function)
    for option in (
        click.option(
            "--save-recipe",
            type=click.Path(path_type=Path),
            help="Write what these options decide of layers and formats to a recipe.",
        ),
        click.option(
            "--recipe", help="A TOML file with such options, or the name of a shipped one: mfptq recipe list."
        ),
        click.option("--kv-cache", help="fp8: tell engines to keep keys and values in FP8."),
        click.option("--fp8", multiple=True, metavar="PATTERN", help="Short for --format fp8-dynamic=PATTERN."),
        click.option(
            "--format",
            "formats",
            multiple=True,
            metavar="FORMAT=PATTERN",
            help="Another format for the layers named; the first that matches one decides. FORMAT is nvfp4, nvfp4a16, "
            "fp8-dynamic, fp8-block, fp8-static, or bf16 to keep.",
        ),
    ):
        function = option(function)
    return function


def resource_options(function: Function) -> Function:
    """Add what a run may use."""
    for option in (
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            help="cpu, cuda, cuda:N, or auto: what should finish first.",
        ),
        click.option("--max-workers", type=int, help="Threads that compute; by default one for each core."),
        click.option("--max-memory", default="1GiB", show_default=True, help="Ceiling for the whole process."),
    ):
        function = option(function)
    return function


def decision_options(function: Function) -> Function:
    """Add all that decides what an output holds: the source, rules, formats, and which files are read."""
    return source_options(rule_options(format_options(file_options(function))))


def decisions_of(options: dict[str, Any]) -> Decisions:
    """Return what the options decide, as the library takes it."""
    kind = options.pop("input_scales_kind")
    options["default_ignore"] = not options.pop("no_default_ignore")
    save = options.pop("save_recipe", None)
    options["target_formats"] = options.get("target_formats") or None
    options["formats"] = (*options.get("formats", ()), *(f"fp8-dynamic={each}" for each in options.pop("fp8", ())))
    if kind is not None:
        from ..scales.reading import read_input_scales

        if options["input_scales"] is None:
            raise UsageError("--input-scales-kind says nothing without --input-scales")
        login = {name: options[name] for name in ("token", "cache_dir")}
        options["input_scales"] = read_input_scales(options["input_scales"], kind, **login)
    if save is not None:
        from .recipe import save_recipe

        save_recipe(save, options)
    return cast("Decisions", options)
