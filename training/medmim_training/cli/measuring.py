"""`medmim-train probe`, `evaluate` and `test`: what a model is worth, in a table."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from medmim.cli.options import HubOption, RatioOption
from medmim.cli.terminal import console, say
from medmim.errors import ScanError, printable
from medmim.files import check_writable
from medmim_training.cli.options import SourceArgument, ThreadsOption, WhereOption, use_threads
from medmim_training.cli.progress import progress_bar, reporting


class ProbeSplit(StrEnum):
    """Which cases `probe` reports on."""

    val = "val"
    test = "test"


def probe(
    model: Annotated[str, typer.Argument(help="Model name, local-dir:FOLDER or hf-hub:ORG/NAME.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results and the features.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value: data=FILE modality=MR model.args.img_size=[32,32,32] ...")
    ] = None,
    split: Annotated[ProbeSplit, typer.Option(help="test: also on the cases kept for the very end.")] = ProbeSplit.val,
    scratch: Annotated[bool, typer.Option("--scratch", help="Random weights, for comparison.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Classifies by frozen features: nearest neighbours and logistic regression, with no training loop.

    Example: `medmim-train probe vit_t_mae3d data=cases.csv -o probe`
    """
    from medmim.memory import keep_freed_memory
    from medmim_training.recipe import make_settings
    from medmim_training.tasks.probe import RESULTS
    from medmim_training.tasks.probe import probe as run_probe
    from medmim_training.tasks.recipe import ProbeRecipe

    use_threads(threads)
    chosen = make_settings(
        {"model": {"name": model, "pretrained": not scratch}}, overrides or [], kind=ProbeRecipe, source="probe"
    )
    check_writable(out / f"{RESULTS}.json")
    keep_freed_memory()
    with progress_bar() as progress:
        task = progress.add_task("encoding", total=None)
        results = run_probe(
            chosen,
            out,
            test=split is ProbeSplit.test,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    table = Table("probe", "cases", "AUC", "balanced accuracy", title=printable(model))
    for each in results:
        name = f"{each.probe} {'k' if each.probe == 'knn' else 'C'}={each.setting:g}"
        values = (
            f"{value:.3f} ({low:.2f} to {high:.2f})"
            for value, (low, high) in (
                (each.scores.auc, each.scores.auc_interval),
                (each.scores.balanced_accuracy, each.scores.balanced_accuracy_interval),
            )
        )
        table.add_row(name, f"{each.cases} {each.side}", *values)
    console.print(table)


def evaluate(
    model: Annotated[str, typer.Argument(help="Model name, local-dir:FOLDER or hf-hub:ORG/NAME.")],
    source: SourceArgument,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="JSON file for the results.")] = None,
    where: WhereOption = None,
    ratio: RatioOption = 0.75,
    hub: HubOption = None,
) -> None:
    """Measures how well hidden voxels are reconstructed, beside fills that need no network.

    Example: `medmim-train evaluate vit_t_mae3d scans/ -o results.json`
    """
    import json

    from medmim.factory import create_decoder, create_model
    from medmim.files import write_text
    from medmim.memory import keep_freed_memory
    from medmim_training.evaluate import evaluate_reconstruction
    from medmim_training.store.sources import find_sources

    if out:
        check_writable(out)
    keep_freed_memory()
    encoder = create_model(model, pretrained=True)
    decoder = create_decoder(encoder)
    sources = find_sources(source, where or [], tell=say)
    with progress_bar() as progress:
        report = reporting(progress, "evaluating", len(sources))
        results = evaluate_reconstruction(encoder, decoder, sources, ratio=ratio, report=report)
    if not results:
        raise ScanError(f"{source}: none of its scans could be evaluated")
    columns = "data", "scans", "model", *results[0].baselines
    table = Table(*columns, title=f"normalised MSE of hidden voxels, {ratio:.0%} of the patches hidden")
    for result in results:
        values = (result.value, *result.baselines.values())
        table.add_row(result.dataset, str(result.cases), *(f"{value:.3f}" for value in values))
    console.print(table)
    if out:
        write_text(out, json.dumps([result.to_data() for result in results], indent=1) + "\n")


def evaluate_segmenter(
    run: Annotated[Path, typer.Argument(help="Folder that `medmim-train finetune` wrote.")],
    validation: Annotated[bool, typer.Option("--validation", help="On the validation cases instead.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the results; default the run's.")] = None,
) -> None:
    """Measures the best model of a fine-tuning run on its test cases, in the scans' own voxels.

    Writes Dice and HD95 of each class and case to test.csv, and their means to test.json.

    Example: `medmim-train test runs/hippocampus`
    """
    import math

    from medmim.memory import keep_freed_memory
    from medmim_training.tasks.evaluation import evaluate_run, means_of, write_evaluation

    side = "validation" if validation else "test"
    check_writable((out or run) / f"{side}.json")
    keep_freed_memory()
    with progress_bar() as progress:
        scores = evaluate_run(run, side, report=reporting(progress, f"{side} cases", None))
    means = means_of(scores)
    table = Table("class", "Dice", "95 %", "HD95, mm", "95 %", title=f"{len({s.case for s in scores})} {side} cases")
    for label, metrics in means.items():
        cells = []
        for metric, digits in (("dice", 4), ("hd95", 2)):
            mean = metrics[metric]
            values = mean.value, mean.low, mean.high
            value, low, high = ("-" if math.isnan(each) else f"{each:.{digits}f}" for each in values)
            cells += [value, f"{low} to {high}"]
        table.add_row(label, *cells)
    console.print(table)
    for path in write_evaluation(out or run, scores, side):
        say(str(path))
