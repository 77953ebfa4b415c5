"""How a command line of medmim speaks: text as it is, and one line for an error raised on purpose, no traceback."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from medmim.errors import MedmimError, printable


class Terminal(Console):
    """A console that shows text as it is: names from files and servers are no markup, and command no terminal."""

    def __init__(self, **settings) -> None:
        super().__init__(markup=False, highlight=False, **settings)

    def render_str(self, text: str, **options) -> Text:
        """Every text that is printed, in a table or alone, comes through here."""
        return super().render_str(printable(text, keep="\n\t"), **options)


def _finite(value: float | None) -> float | None:
    # No bound of an option refuses NaN, which is neither above nor below one.
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number")
    return value


RatioOption = Annotated[float, typer.Option(min=0.05, max=0.95, callback=_finite, help="Share of the patches to hide.")]
TflopsOption = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        callback=_finite,
        help="TFLOP/s of the hardware, for the time it takes; default as measured.",
    ),
]


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
    print(f"{Path(sys.argv[0]).name}: error: {printable(str(error))}", file=sys.stderr)
