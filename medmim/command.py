"""How a command line of medmim ends: one line for an error that medmim raised on purpose, no traceback."""

from __future__ import annotations

import sys

import typer

from medmim.errors import MedmimError


def run(app: typer.Typer) -> None:
    """Runs a typer application: exit code 1 for a `MedmimError`, 130 for an interrupt, 2 for wrong usage."""
    try:
        app()
    except MedmimError as error:
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
