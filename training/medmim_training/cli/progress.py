"""Bars for what is done one by one: scans, runs."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from medmim.cli.terminal import console


class Bar(Progress):
    """Is drawn once something is done: of a command that refuses its input, only the error is seen."""

    def __enter__(self) -> Bar:
        return self

    def update(self, *args, **changes) -> None:
        self.start()
        super().update(*args, **changes)

    def advance(self, *args, **changes) -> None:
        self.start()
        super().advance(*args, **changes)

    def __exit__(self, *error) -> None:
        if self.live.is_started:
            self.stop()


def progress_bar() -> Bar:
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Bar(*columns, console=console)


def reporting(progress: Progress, title: str, total: int | None) -> Callable[[str, str | None], None]:
    """A bar, and what to call after each scan; scans with a problem are printed above the bar."""
    task = progress.add_task(title, total=total)

    def report(name: str, problem: str | None) -> None:
        progress.advance(task)
        if problem:
            progress.console.print(Text("left out", style="yellow"), problem, soft_wrap=True)

    return report
