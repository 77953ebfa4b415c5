"""`medmim-train reproduce`: all runs of an experiment, and the page about them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from medmim.cli.terminal import console
from medmim.errors import printable
from medmim.files import check_writable
from medmim_training.cli.options import TflopsOption, ThreadsOption, use_threads
from medmim_training.cli.progress import progress_bar

if TYPE_CHECKING:
    from medmim_training.reproduce.runner import Runner


def reproduce(
    experiment: Annotated[str, typer.Argument(help="Name of an experiment (paper-small), or YAML file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the runs; runs in it are kept.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder as the Decathlon has it, with subjects.csv; --smoke makes its own.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="A table whose runs to do; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the runs and what they will take.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Only write the page, from the runs that are done.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="All in a tiny form, on shapes made by formula.")] = False,
    tflops: TflopsOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Runs all of an experiment, and writes a page about it; the same command goes on where it was stopped.

    Several processes may share the folder: each takes runs that no other is doing.

    Example: `medmim-train reproduce paper-small --data Task04_Hippocampus -o runs/paper-small`
    """
    from medmim.memory import keep_freed_memory
    from medmim_training.reproduce.experiment import load_experiment
    from medmim_training.reproduce.page import PAGE, write_report
    from medmim_training.reproduce.runner import Progress as RunProgress
    from medmim_training.reproduce.runner import Runner
    from medmim_training.reproduce.shapes import write_shapes

    use_threads(threads)
    chosen = load_experiment(experiment)
    check_writable(out / "report" / PAGE)
    keep_freed_memory()
    if smoke and data is None:
        data = out / "shapes"
        write_shapes(data, cases=5, tests=1)
    if data is None:
        raise typer.BadParameter("an experiment needs --data FOLDER; `medmim-train fetch-data` makes one")
    runner = Runner(chosen, data, out, only=only or [], smoke=smoke)
    if dry_run:
        _print_runs(runner, tflops)
        return

    with progress_bar() as progress:
        task = progress.add_task(printable(chosen.name), total=len(runner.wanted))

        def watch(told: RunProgress) -> None:
            if told.step is None:
                state = "done" if told.problem is None else f"failed: {told.problem}"
                progress.console.print(f"{told.number}/{told.total}  {told.run.id}  {state}", soft_wrap=True)
            progress.update(task, completed=told.number - (told.step is not None), description=told.run.id)

        try:
            if not report:
                runner.run(watch)
                if others := len(runner.left()):
                    progress.console.print(f"{others} runs are being done by other processes; --report makes the page")
            else:
                runner.write_manifest()
        finally:
            page = write_report(runner, out / "report")
            progress.console.print(f"page: {page}", soft_wrap=True)


def _print_runs(runner: Runner, tflops: float | None) -> None:
    from medmim_training.plan import matrix_product_rate
    from medmim_training.reproduce.estimate import flops

    rate = tflops * 1e12 if tflops else matrix_product_rate("fp32")
    table = Table("run", "for", "minutes", "done", title=f"{len(runner.wanted)} runs")
    hours, left = 0.0, runner.left()
    for wanted in runner.wanted:
        minutes = flops(wanted, runner.split) / rate / 60
        hours += minutes / 60 if wanted in left else 0
        done = "" if wanted in left else "yes" if runner.is_done(wanted) else "not needed"
        rows = "; ".join(f"{name}: {row}" for name, row in getattr(wanted, "rows", ()))
        table.add_row(wanted.id, rows, f"{minutes:.1f}", done)
    console.print(table)
    where = "given" if tflops else "of matrix products here"
    console.print(f"left, at the least: {hours:.1f} hours at {rate / 1e12:.3f} TFLOP/s ({where})")
