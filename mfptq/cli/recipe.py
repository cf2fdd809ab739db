"""Define the commands of `mfptq recipe`, which list, show and check recipes, and write one for `--save-recipe`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from .columns import fitted
from .groups import Commands


def save_recipe(path: Path, options: Mapping[str, Any]) -> None:
    """Write what options decide of layers and formats, with those of the recipe that they name, to a new file or over one."""
    from ..planning.recipes import load_recipe, recipe_text, with_recipe
    from ..storage.files import expanded, storage_errors

    given = options.get("recipe")
    decisions = with_recipe(options, load_recipe(given)) if given is not None else options
    target = expanded(path)
    with storage_errors("write", target):
        target.write_text(recipe_text(decisions))


@click.group(cls=Commands)
def recipe() -> None:
    """Show and check recipes: the decisions of a conversion as a small TOML file.

    Example: mfptq recipe list
    """


@recipe.command(name="list")
def list_recipes() -> None:
    """List the recipes that come with mfptq, and when to use each.

    Example: mfptq recipe list
    """
    from ..planning.recipes import load_recipe, shipped

    names = shipped()
    width = max(map(len, names))
    for name in names:
        click.echo(fitted(f"{name:{width}}  {load_recipe(name).description}"))


@recipe.command()
@click.argument("name")
def show(name: str) -> None:
    """Print the recipe NAME, shipped or a file, ready to be changed.

    Example: mfptq recipe show attention-fp8
    """
    from ..planning.recipes import load_recipe

    click.echo(load_recipe(name).text, nl=False)


@recipe.command()
@click.argument("name")
@click.argument("model", required=False)
def check(name: str, model: str | None) -> None:
    """Check the recipe NAME, shipped or a file; with MODEL, folder or Hub repo, also against its layers.

    Example: mfptq recipe check attention-fp8 Qwen/Qwen3.5-27B
    """
    from ..planning.recipes import load_recipe
    from ..planning.settings import check_decisions

    found = load_recipe(name)
    check_decisions({"recipe": name})
    if model is None:
        click.echo(f"{found.name}: no fault")
        return
    from ..planner import make_plan
    from .text import formats_text

    with closing(make_plan(model, recipe=name)) as made:
        elements = sum(math.prod(item.candidate.tensor.info.shape) for item in made.selection.tensors)
        bits = made.tensor_bytes * 8 / elements
        click.echo(f"{found.name}: no fault; {formats_text(made.formats)}, {bits:.2f} bits per weight")
