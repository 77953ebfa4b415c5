"""`medmim-train fetch-data`, `prepare` and `inspect`: scans, and the store that is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from medmim.cli.terminal import console, say
from medmim.files import check_writable
from medmim_training.cli.options import SourceArgument, WhereOption
from medmim_training.cli.progress import progress_bar, reporting


def fetch_data(
    name: Annotated[str, typer.Argument(help="hippocampus")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
) -> None:
    """Fetches a data set of the Medical Segmentation Decathlon, with the split that experiments are reported on.

    Example: `medmim-train fetch-data hippocampus -o Task04_Hippocampus`
    """
    from medmim_training.fetch import fetch_data as fetch

    cases, left_out = fetch(name, out)
    say(f"{out}: {cases} cases; {left_out} that the split does not list were left out")


def prepare(
    source: SourceArgument,
    store: Annotated[Path, typer.Option("-o", "--store", help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help="Recipe (or YAML file) whose preprocessing to use.")],
    where: WhereOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Reorients, resamples and compresses scans into a store, once.

    Example: `medmim-train prepare scans/ -o store --recipe small/vit_t_mae3d`
    """
    from medmim_training.recipe import load_recipe
    from medmim_training.store.index import STORE_FILE
    from medmim_training.store.prepare import prepare as prepare_store
    from medmim_training.store.sources import find_sources

    check_writable(store / STORE_FILE)
    volume = load_recipe(recipe).volume
    sources = find_sources(source, where or [], tell=say)
    with progress_bar() as progress:
        report = reporting(progress, "preparing", len(sources))
        added, refused = prepare_store(sources, store, volume=volume, workers=workers, report=report)
    kept = len(sources) - added - refused
    say(f"{store}: {added} added, {kept} there already, {refused} left out (problems.jsonl says why)")


def inspect(
    store: Annotated[Path, typer.Argument(help="Folder that `medmim-train prepare` wrote.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the pictures; default the store.")] = None,
) -> None:
    """Shows what a store holds: counts, histograms of spacing and intensity, a contact sheet.

    Example: `medmim-train inspect store`
    """
    from medmim_training.store.index import Store
    from medmim_training.store.inspect import counts, draw_contact_sheet, draw_histograms

    opened, folder = Store(store), out or store
    check_writable(folder / "histograms.png")
    table = Table("group", "modality", "volumes", "million voxels", title=f"{len(opened.entries)} volumes")
    for group, modality, volumes, voxels in counts(opened):
        table.add_row(group, modality, str(volumes), f"{voxels:.1f}")
    console.print(table)
    for name, draw in (("histograms.png", draw_histograms), ("contact_sheet.png", draw_contact_sheet)):
        draw(opened, folder / name)
        say(str(folder / name))
