"""How a command line of medmim speaks: text as it is, and one line for an error raised on purpose, no traceback."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medmim.errors import MedmimError, printable


class Terminal(Console):
    """A console that shows text as it is: names from files and servers are no markup, and command no terminal."""

    def __init__(self, **settings) -> None:
        super().__init__(markup=False, highlight=False, **settings)

    def render_str(self, text: str, **options) -> Text:
        """Every text that is printed, in a table or alone, comes through here."""
        return super().render_str(printable(text, keep="\n\t"), **options)


console = Terminal()


def say(line: str) -> None:
    """Prints a line that is never broken, so that paths in it can be copied."""
    console.print(line, soft_wrap=True)


def new_table(*columns: str) -> Table:
    """A table without lines, whose long cells are folded, not cut."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal while something runs; what it yields is called with steps done and steps in all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    terminal = Terminal(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(printable(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def run(app: typer.Typer) -> None:
    """Runs a typer application: the exit code of a `MedmimError`, 1 when a file system fails, 130 for an interrupt.

    Typer itself exits with 2 for wrong usage.
    """
    _refuse_empty(sys.argv[1:])
    try:
        app()
    except MedmimError as error:
        report(error)
        sys.exit(error.exit_code)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        report(f"{error}; make room, and start the same command again" if is_full else error)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _refuse_empty(arguments: list[str]) -> None:
    """An empty path is this folder: where a variable of a shell is not set, files would be written to it."""
    empty = next((a for a in arguments if not a or re.fullmatch(r"--[\w-]+=", a)), None)
    if empty is not None:
        report(f"an argument is empty ({empty or repr(empty)}); give it a value, or leave its option out")
        sys.exit(2)


def report(error: MedmimError | OSError | str) -> None:
    """Prints an error as one line that starts with the name of the command."""
    print(f"{Path(sys.argv[0]).name}: error: {printable(str(error))}", file=sys.stderr)
