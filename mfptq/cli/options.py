"""Define the options that several commands share, as decorators, and turn them into the library's decisions.

Called by the modules that define commands. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from ..errors import UsageError
from ..names.bridge import SCALE_KINDS

if TYPE_CHECKING:
    from ..planning.settings import Decisions

Decorator = Callable[[Any], Any]


def together(*options: Decorator) -> Decorator:
    """Return one decorator for several options; help lists them in this order."""

    def add(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return add


json_option = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Discard an existing output of mfptq and start over.")
links_option = click.option(
    "--follow-links",
    is_flag=True,
    help="Read files that are links out of the source's folder; only where you trust it.",
)

# Where on the Hub a checkpoint is.
source_options = together(
    click.option("--revision", help="Branch, tag or commit on the Hub."),
    click.option("--token", help="Hub token; HF_TOKEN and a stored login work too."),
    click.option("--cache-dir", type=click.Path(path_type=Path), help="Folder of the Hub's cache."),
)

# How a model is run over text.
forward_options = together(
    click.option("--device", default="cpu", show_default=True, help="cpu, or a torch device such as cuda:0."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float32"]),
        default="auto",
        show_default=True,
        help="To compute in; float32 is faster on CPUs without bfloat16.",
    ),
    click.option("--max-memory", help="Ceiling for the process; a larger model is read block by block."),
)

# Which layers are quantized, with which method and input scales.
rule_options = together(
    click.option(
        "--scheme",
        help="NVFP4 (W4A4: activations in FP4 too) or NVFP4A16 (W4A16: weights alone); by default W4A4 where input scales "
        "are given.",
    ),
    click.option(
        "--method",
        help="search (least error of weights), minmax (plain rounding); with --calibration also weighted, hessian, "
        "hessian+, gptq (least error of outputs), or auto, its default: the strongest that the file allows.",
    ),
    click.option("--ignore", multiple=True, metavar="PATTERN", help="Do not quantize: a module name, or re:REGEX."),
    click.option(
        "--target",
        "targets",
        multiple=True,
        metavar="PATTERN",
        help="Quantize what a default exclusion keeps: a module name, or re:REGEX.",
    ),
    click.option(
        "--no-default-ignore",
        is_flag=True,
        help="Drop the default exclusions: heads, routers, vision towers and the like.",
    ),
    click.option("--force", is_flag=True, help="Quantize even what no engine is known to load in FP4."),
    click.option(
        "--calibration", type=click.Path(), help="A file made by mfptq calibrate: gives W4A4, and better weights."
    ),
    click.option(
        "--like",
        type=click.Path(),
        help="An NVFP4 or FP8 checkpoint, folder or Hub repo: quantize the layers that it quantizes, with its input scales.",
    ),
    click.option(
        "--input-scales",
        type=click.Path(),
        help="Input scales for W4A4: JSON, safetensors, checkpoint folder or Hub repo, or auto (no calibration).",
    ),
    click.option(
        "--input-margin",
        type=float,
        help="Factor that widens the input ranges of --calibration; by default 4, for minmax 1.",
    ),
    click.option(
        "--smooth/--no-smooth",
        default=None,
        help="With --calibration: scale outlier channels of the inputs into the weights. By default for W4A4 by --method auto.",
    ),
    click.option("--input-scales-kind", type=click.Choice(SCALE_KINDS), help="What the numbers of --input-scales are."),
)

# Which format each layer gets, from options or from a recipe.
format_options = together(
    click.option(
        "--format",
        "formats",
        multiple=True,
        metavar="FORMAT=PATTERN",
        help="Another format for the layers named; the first that matches one decides. FORMAT is nvfp4, nvfp4a16, "
        "fp8-dynamic, fp8-block, fp8-static, or bf16 to keep.",
    ),
    click.option("--fp8", multiple=True, metavar="PATTERN", help="Short for --format fp8-dynamic=PATTERN."),
    click.option("--kv-cache", help="fp8: tell engines to keep keys and values in FP8."),
    click.option("--recipe", help="A TOML file with such options, or the name of a shipped one: mfptq recipe list."),
    click.option(
        "--save-recipe",
        type=click.Path(path_type=Path),
        help="Save what these options decide of layers and formats as a recipe.",
    ),
)

# A size to aim at: formats are chosen so that the output fits.
target_options = together(
    click.option(
        "--target-bits",
        type=float,
        metavar="BITS",
        help="At most so many bits for a quantized weight on average, as 5.2: formats for the least predicted error of "
        "outputs.",
    ),
    click.option("--target-size", metavar="SIZE", help="The same for all safetensors files together, as 20GB."),
    click.option(
        "--target-format",
        "target_formats",
        multiple=True,
        metavar="FORMAT",
        help="A format besides FP4 that a target may choose: fp8-dynamic, bf16; by default both.",
    ),
    click.option(
        "--format-errors",
        type=click.Path(path_type=Path),
        help="A file that keeps the errors measured for a target, for later runs; convert has one beside OUTPUT.",
    ),
)

# Which files of the source are read, and how.
file_options = together(
    click.option(
        "--include-file",
        "include_files",
        multiple=True,
        metavar="NAME",
        help="Take in a safetensors file that no index names.",
    ),
    click.option(
        "--skip-file",
        "skip_files",
        multiple=True,
        metavar="NAME",
        help="Leave out a safetensors file that no index names.",
    ),
    click.option("--keep-source", is_flag=True, help="Download a Hub repo whole into its cache, and keep it there."),
    links_option,
)

decision_options = together(source_options, rule_options, format_options, target_options, file_options)

# What a run may use.
resource_options = together(
    click.option("--max-memory", default="1GiB", show_default=True, help="Ceiling for the whole process."),
    click.option("--max-workers", type=int, help="Threads that compute; by default one for each core."),
    click.option(
        "--device",
        default="cpu",
        show_default=True,
        help="cpu, cuda, cuda:N, or auto: the one that should finish first.",
    ),
)


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
