"""How a command line of medmim ends: one line for an error that medmim raised on purpose, no traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from medmim.errors import MedmimError


def run(app: typer.Typer) -> None:
    """Runs a typer application: the exit code of a `MedmimError`, 1 when a file system fails, 130 for an interrupt.

    Typer itself exits with 2 for wrong usage.
    """
    try:
        app()
    except (MedmimError, OSError) as error:
        report(error)
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def report(error: MedmimError | OSError | str) -> None:
    """Prints an error as one line that starts with the name of the command."""
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
