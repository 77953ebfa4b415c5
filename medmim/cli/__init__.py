"""`medmim`: look models up; embed, segment, classify and reconstruct scans; publish, copy and verify weights."""

from __future__ import annotations

from typing import Annotated

import typer

from medmim import __version__
from medmim.cli.copies import mirror, verify
from medmim.cli.exporting import export_command
from medmim.cli.listing import info, list_command
from medmim.cli.pictures import demo, reconstruct
from medmim.cli.prediction import classify, embed, segment
from medmim.cli.publishing import cards, push
from medmim.cli.terminal import run, say

# As `medmim --help` lists them.
COMMANDS = {
    "list": list_command,
    "info": info,
    "embed": embed,
    "segment": segment,
    "classify": classify,
    "reconstruct": reconstruct,
    "export": export_command,
    "cards": cards,
    "demo": demo,
    "push": push,
    "mirror": mirror,
    "verify": verify,
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,  # a token may be among them
    help="Encoders for 3-D medical scans, pretrained by masked image modelling.",
)
for name, command in COMMANDS.items():
    app.command(name)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"medmim {__version__}")
        raise typer.Exit


@app.callback()
def before_the_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Shows the version, and ends.")
    ] = False,
) -> None:
    # What stands before a command. A docstring would replace the help of the application.
    pass


def main() -> None:
    """Entry point: errors for people, no tracebacks."""
    run(app)
