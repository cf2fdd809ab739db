"""Write docs/cli.md from the command line itself: `python -m tests.generate_cli_docs`. A test checks that it is current."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from mfptq.cli.main import main

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# Command line

Made from the program's own help by `python -m tests.generate_cli_docs`.

Data go to stdout, everything else to stderr. [Exit codes](reliability.md#when-a-run-stops) are the same for all commands. Control characters in names of a
checkpoint are never written raw to the terminal.

Completion of commands and options, for one shell at a time or in its start-up file:

    eval "$(_MFPTQ_COMPLETE=bash_source mfptq)"
    eval "$(_MFPTQ_COMPLETE=zsh_source mfptq)"
    _MFPTQ_COMPLETE=fish_source mfptq | source
"""


def commands(command: click.Command = main, name: str = "mfptq") -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its full name, groups before what they hold."""
    yield name, command
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from commands(inner, f"{name} {inner.name}")


def options(command: click.Command) -> list[click.Option]:
    """Return the options of a command."""
    return [param for param in command.params if isinstance(param, click.Option) and not param.hidden]


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(_section(name, command) for name, command in commands())])


def _section(name: str, command: click.Command) -> str:
    text, _, example = (command.help or "").partition("Example:")
    lines = [f"## {name}", "", " ".join(text.split()), ""]
    if example:
        lines += ["```bash", " ".join(example.split()), "```", ""]
    lines += [f"Usage: `{' '.join([name, *_arguments(command)])}`", ""]
    rows = [f"| `{_names(option)}` | {_meaning(option)} |" for option in options(command)]
    return "\n".join([*lines, *(["| option | meaning |", "|---|---|", *rows, ""] if rows else [])])


def _arguments(command: click.Command) -> Iterator[str]:
    if options(command):
        yield "[OPTIONS]"
    if isinstance(command, click.Group):
        yield "COMMAND ..."
    for param in command.params:
        if isinstance(param, click.Argument):
            yield (param.metavar or str(param.name).upper()) + ("..." if param.nargs == -1 else "")


def _names(option: click.Option) -> str:
    """Return an option's names and what it takes; a bar inside a table must be escaped."""
    names = ", ".join(option.opts) + "".join(f" / {name}" for name in option.secondary_opts)
    return names if option.is_flag else f"{names} {_takes(option)}"


def _takes(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return "\\|".join(map(str, option.type.choices))
    return option.metavar or {"integer": "N", "path": "PATH"}.get(option.type.name, "TEXT")


def _meaning(option: click.Option) -> str:
    notes = [text for text, holds in (("required", option.required), ("may be repeated", option.multiple)) if holds]
    if option.show_default and option.default not in (None, ""):
        value = option.default
        if option.secondary_opts:
            value = (option.opts if value else option.secondary_opts)[0]
        notes.append(f"default: {value}")
    return " ".join([(option.help or "").replace("|", "\\|"), f"({'; '.join(notes)})" if notes else ""]).strip()


if __name__ == "__main__":
    PAGE.write_text(page())
