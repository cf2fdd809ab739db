"""Define how `mfptq`, `mfptq calibration` and `mfptq recipe` list their commands and take `-v` behind them."""

from __future__ import annotations

import click

from .process import LOG_LEVELS, set_up_logging


def _set_level(_ctx: click.Context, param: click.Parameter, value: str | bool | None) -> None:
    if value:
        set_up_logging(str(value) if param.name == "log_level" else "info")


class Commands(click.Group):
    """A group whose help gives every command its whole first sentence."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command; it takes `-v` and `--log-level` too, which belong to `mfptq`, for those who write them behind it."""
        if not isinstance(cmd, click.Group) and "verbose" not in {param.name for param in cmd.params}:
            cmd.params += [
                click.Option(["-v", "--verbose"], is_flag=True, hidden=True, expose_value=False, callback=_set_level),
                click.Option(
                    ["--log-level"], type=click.Choice(LOG_LEVELS), hidden=True, expose_value=False, callback=_set_level
                ),
            ]
        super().add_command(cmd, name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands and what they do; click would cut the sentences short."""
        whole = [(name, self.commands[name].get_short_help_str(limit=1000)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(whole)
