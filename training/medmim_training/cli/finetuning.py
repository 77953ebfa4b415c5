"""`medmim-train finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from medmim.cli.terminal import console, say
from medmim.errors import printable
from medmim.files import check_writable
from medmim_training.cli.options import ThreadsOption, use_threads


def finetune(
    recipe: Annotated[str, typer.Argument(help="Recipe name (finetune/...) or YAML file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run; a run in it resumes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example data=FOLDER labels=10% seed=1")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Fine-tunes an encoder for segmentation or classification; resumes where an interrupted run stopped.

    Example: `medmim-train finetune finetune/vit_t_unetr data=Task04_Hippocampus labels=10% -o runs/hippocampus`
    """
    from medmim.memory import keep_freed_memory
    from medmim_training.engine import RECIPE_FILE
    from medmim_training.recipe import load_recipe
    from medmim_training.record import Report
    from medmim_training.tasks.finetuning import finetune as run_finetuning
    from medmim_training.tasks.loop import MODEL, Validation
    from medmim_training.tasks.recipe import FineTuneRecipe

    use_threads(threads)
    chosen = load_recipe(recipe, overrides or [], kind=FineTuneRecipe)
    check_writable(out / RECIPE_FILE)
    keep_freed_memory()
    use = "segment SCAN -o masks" if chosen.task == "segmentation" else "classify SCAN -o classes.csv"
    what, state = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[state]}"))
    columns = what, BarColumn(), MofNCompleteColumn(), state
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(printable(chosen.name), total=chosen.schedule.steps, state="")

        def watch(step: Report) -> None:
            state = f"loss {step.loss:.4f}  {step.crops_per_second:.1f} crops/s  {step.seconds_left / 60:.0f} min left"
            progress.update(task, completed=step.step, state=state)

        def watch_validation(found: Validation) -> None:
            progress.console.print(f"step {found.step}: {found}", highlight=False)

        run_finetuning(chosen, out, watch=watch, watch_validation=watch_validation)
    named = f" --modality {chosen.modality}" if chosen.modality else ""
    say(f"done: {out}; use it: medmim {use} -m local-dir:{out / MODEL}{named}")
