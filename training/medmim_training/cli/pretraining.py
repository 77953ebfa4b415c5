"""`medmim-train pretrain`: the run, and what it will need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from medmim.cli.terminal import console, say
from medmim.errors import printable
from medmim.files import check_writable
from medmim_training.cli.options import TflopsOption, ThreadsOption, use_threads

if TYPE_CHECKING:
    from medmim_training.recipe import Recipe


def pretrain(
    recipe: Annotated[str, typer.Argument(help="Recipe name or YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example schedule.steps=100")] = None,
    data: Annotated[Path | None, typer.Option(help="Store made by `medmim-train prepare`.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the run; a run in it resumes.")] = None,
    threads: ThreadsOption = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Split the weights over the processes (FSDP2), for large models.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the run needs.")] = False,
    tflops: TflopsOption = None,
) -> None:
    """Pretrains an encoder; resumes where an interrupted run stopped.

    Example: `medmim-train pretrain small/vit_t_mae3d --data store -o runs/vit_t schedule.steps=100 schedule.warmup=10`
    """
    from medmim_training.recipe import load_recipe

    use_threads(threads)
    chosen = load_recipe(recipe, overrides or [])
    if plan:
        _print_plan(chosen, tflops)
        return
    if data is None or out is None:
        raise typer.BadParameter("a run needs --data STORE and --out FOLDER; --plan does without")
    from medmim.memory import keep_freed_memory
    from medmim_training.engine import RECIPE_FILE
    from medmim_training.engine import pretrain as run_pretraining
    from medmim_training.record import Report
    from medmim_training.store.index import Store

    check_writable(out / RECIPE_FILE)
    store = Store(data)
    keep_freed_memory()
    what, state = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[state]}"))
    columns = what, BarColumn(), MofNCompleteColumn(), state
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(printable(chosen.name), total=chosen.schedule.steps, state="")

        def watch(step: Report) -> None:
            state = (
                f"loss {step.loss:.4f}  {step.crops_per_second:.1f} crops/s  waiting {step.waiting:.0%}  "
                f"{step.seconds_left / 60:.0f} min left"
            )
            progress.update(task, completed=step.step, state=state)
            if not console.is_terminal:
                print(f"{step.step}/{step.steps}  {state}", flush=True)

        run_pretraining(chosen, store, out, sharded=shard, watch=watch)
    say(f"done: {out}")


def _print_plan(recipe: Recipe, tflops: float | None) -> None:
    from medmim_training.plan import make_plan, matrix_product_rate
    from medmim_training.precision import resolve_precision

    needs = make_plan(recipe)
    rate = tflops * 1e12 if tflops else matrix_product_rate(recipe.precision)
    where = "given" if tflops else f"{resolve_precision(recipe.precision)} matrix products here"
    table = Table(title=f"{recipe.name}: {recipe.summary}", show_header=False)
    for name, value in (
        ("parameters", f"{needs.parameters / 1e6:.1f} M, {needs.encoder_parameters / 1e6:.1f} M of them the encoder's"),
        ("crops", f"{needs.crops:,} in {recipe.schedule.steps:,} steps of {recipe.batch_size}"),
        ("arithmetic", f"{needs.flops_per_crop / 1e9:.1f} GFLOP a crop, forward and backward"),
        ("memory, activations", f"{needs.activation_bytes / 2**30:.2f} GiB for one process"),
        ("memory, weights and optimizer", f"{needs.state_bytes / 2**30:.2f} GiB"),
        ("time, at the least", f"{needs.hours(rate):.1f} hours at {rate / 1e12:.2f} TFLOP/s ({where})"),
    ):
        table.add_row(name, value)
    console.print(table)
