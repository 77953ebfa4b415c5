"""`medmim-train`: prepare scans, pretrain, package weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from medmim.command import run

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__)
console = Console()


def main() -> None:
    """Entry point: errors for people, no tracebacks."""
    run(app)


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="A folder of scans, or a CSV data list.")],
    store: Annotated[Path, typer.Option("-o", "--store", help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help="Recipe (or YAML file) whose preprocessing to use.")],
    where: Annotated[
        list[str] | None, typer.Option(help="Filter on a column of the CSV: column=pattern,... or column!=pattern,...")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Reorients, resamples and compresses scans into a store, once.

    Example: `medmim-train prepare scans/ -o store --recipe small/vit_t_mae3d`
    """
    from medmim_training.recipe import load_recipe
    from medmim_training.store.prepare import prepare as prepare_store
    from medmim_training.store.sources import find_sources

    sources = find_sources(source, where or [])
    volume = load_recipe(recipe).volume
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("preparing", total=len(sources))

        def report(name: str, problem: str | None) -> None:
            progress.advance(task)
            if problem:
                progress.console.print(f"[yellow]left out[/] {problem}", soft_wrap=True, highlight=False)

        added, refused = prepare_store(sources, store, volume=volume, workers=workers, report=report)
    kept = len(sources) - added - refused
    console.print(f"{store}: {added} added, {kept} there already, {refused} left out (problems.jsonl says why)")


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="Recipe name or YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example schedule.steps=100")] = None,
    data: Annotated[Path, typer.Option(help="Store made by `medmim-train prepare`.")] = ...,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run; an interrupted run resumes.")] = ...,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default all cores.")] = None,
) -> None:
    """Pretrains an encoder; resumes where an interrupted run stopped.

    Example: `medmim-train pretrain small/vit_t_mae3d --data store -o runs/vit_t schedule.steps=100`
    """
    import torch

    from medmim_training.engine import Progress as Step
    from medmim_training.engine import pretrain as run_pretraining
    from medmim_training.recipe import load_recipe
    from medmim_training.store.index import Store

    if threads:
        torch.set_num_threads(threads)
    chosen = load_recipe(recipe, overrides or [])
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}")
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(chosen.name, total=chosen.schedule.steps, state="")

        def watch(step: Step) -> None:
            state = (
                f"loss {step.loss:.4f}  {step.crops_per_second:.1f} crops/s  waiting {step.waiting:.0%}  "
                f"{step.seconds_left / 60:.0f} min left"
            )
            progress.update(task, completed=step.step, state=state)
            if not console.is_terminal:
                print(f"{step.step}/{step.steps}  {state}", flush=True)

        run_pretraining(chosen, Store(data), out, watch=watch)
    console.print(f"done: {out}")
