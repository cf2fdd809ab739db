"""Define the kind of group that `mfptq` and its groups of commands are."""

from __future__ import annotations

import click


class Commands(click.Group):
    """A group whose help gives every command its whole first sentence."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands and what they do; click would cut the sentences short."""
        whole = [(name, self.commands[name].get_short_help_str(limit=1000)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(whole)
