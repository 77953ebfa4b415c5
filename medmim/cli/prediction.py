"""`medmim embed`, `segment` and `classify`: what a model makes of many scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmim.cli.options import (
    DEFAULT_MODEL,
    HubOption,
    Modality,
    ModalityOption,
    ModelOption,
    ScansArgument,
    TaskModelOption,
    check_output,
    load_model,
)
from medmim.cli.terminal import progress_bar, report, say
from medmim.errors import ScanError

if TYPE_CHECKING:
    from medmim.inference import Embedding


def embed(
    scans: ScansArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for a safetensors file a scan, or one such file for all.")
    ],
    model: ModelOption = DEFAULT_MODEL,
    modality: ModalityOption = None,
    hub: HubOption = None,
) -> None:
    """Writes the dense features and one pooled vector of each scan.

    A scan is called by its file name without the suffix, or by its path in the folder that was given. One that cannot
    be used is reported and the others go on; the exit code is then 1. Scans that are done are skipped. One file for all
    is written at the end, or when the run is stopped (Ctrl-C) or fails: with the scans that were done; until then they
    are in memory. It holds no others than those that are given.

    Example: `medmim embed scans/ -o features`
    """
    if output.suffix == ".safetensors" or (output.suffix and not output.is_dir()):
        check_output(output, ".safetensors", otherwise="be a folder, which has no suffix")
        _embed_to_file(scans, output, model, modality)
    else:
        _embed_to_folder(scans, output, model, modality)


def _embed_to_folder(scans: list[Path], folder: Path, model: str, modality: Modality | None) -> None:
    from medmim.cohort import file_of, name_scans, place_files
    from medmim.inference import check_embeddings, save_embeddings

    named = name_scans(scans, outside=folder)
    files = place_files(named, folder, ".safetensors")
    embed_scan, made_by = _embedding_with(model, modality)
    there = [name for name in named if files[name].is_file()]
    for name in there:
        check_embeddings(files[name], name=name, scan=file_of(named[name]), model=made_by)
    left = {name: scan for name, scan in named.items() if name not in there}

    def write(name: str, scan: Path, progress: Callable[[int, int], None]) -> None:
        save_embeddings(files[name], {name: embed_scan(scan, progress)})

    _conclude(folder, len(left), _each_scan(left, write), already=len(there))


def _embed_to_file(scans: list[Path], file: Path, model: str, modality: Modality | None) -> None:
    from medmim.cohort import file_of, name_scans
    from medmim.inference import read_embeddings, save_embeddings

    named = name_scans(scans)
    embed_scan, made_by = _embedding_with(model, modality)
    embeddings = read_embeddings(file, scans={name: file_of(scan) for name, scan in named.items()}, model=made_by)
    already, left = len(embeddings), {name: scan for name, scan in named.items() if name not in embeddings}

    def add(name: str, scan: Path, progress: Callable[[int, int], None]) -> None:
        embeddings[name] = embed_scan(scan, progress)

    try:
        _each_scan(left, add)
    finally:  # hours of work are not lost to what ends the rest
        if embeddings:
            save_embeddings(file, embeddings)
        _say_done(file, len(embeddings) - already, len(left), already=already)
    if len(embeddings) < len(named):
        raise typer.Exit(1)


def _embedding_with(
    name: str, modality: Modality | None
) -> tuple[Callable[[Path, Callable[[int, int], None]], Embedding], str]:
    """What embeds a scan, and says of which file and model the result is; and that model, in the same words."""
    from medmim.cohort import file_of
    from medmim.identity import identity
    from medmim.inference import embed as embed_scan

    network = load_model(name)
    made_by = identity(network, modality=modality)

    def embed_one(scan: Path, progress: Callable[[int, int], None]) -> Embedding:
        found = embed_scan(network, scan, modality=modality and modality.value, progress=progress)
        return replace(found, model=made_by, scan=file_of(scan))

    return embed_one, made_by


def segment(
    scans: ScansArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the masks and `volumes.csv`.")],
    model: TaskModelOption,
    modality: ModalityOption = None,
    hub: HubOption = None,
) -> None:
    """Labels the voxels of scans: a mask each, in the scan's own voxels, and the volume of each class in millilitres.

    Scans that have their mask are skipped. One that cannot be used is reported and the others go on; the exit code is
    then 1.

    Example: `medmim segment scans/ -m local-dir:hippocampus -o masks`
    """
    from medmim.cohort import ScanTable, name_scans, place_files
    from medmim.identity import identity
    from medmim.segmentation import read_segmentation, segmented_classes
    from medmim.segmentation import segment as segment_scan

    named = name_scans(scans, outside=output)
    masks = place_files(named, output, ".nii.gz")
    network = load_model(model)
    classes = segmented_classes(network)
    made_by = identity(network, modality=modality)
    table = ScanTable(output / "volumes.csv", [f"{name} (ml)" for name in classes[1:]], model=made_by)
    without_row = table.without_row(named)
    left = {name: scan for name, scan in named.items() if name in without_row or not masks[name].is_file()}

    def label(name: str, scan: Path, progress: Callable[[int, int], None]) -> None:
        if masks[name].is_file():  # the run was stopped before it wrote the row
            result = read_segmentation(masks[name], classes, scan=scan, model=made_by)
        else:
            result = segment_scan(network, scan, modality=modality and modality.value, progress=progress)
            result.save(masks[name], model=made_by)
        table.add(name, scan, result.millilitres.values())

    _conclude(output, len(left), _each_scan(left, label), already=len(named) - len(left))


def classify(
    scans: ScansArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV file to write, or to add to.")],
    model: TaskModelOption,
    modality: ModalityOption = None,
    hub: HubOption = None,
) -> None:
    """Writes the probability of each class for each scan.

    Scans that have their row are skipped. One that cannot be used is reported and the others go on; the exit code is
    then 1.

    Example: `medmim classify scans/ -m local-dir:adrenal -o classes.csv`
    """
    check_output(output, ".csv")
    from medmim.classification import classified_classes
    from medmim.classification import classify as classify_scan
    from medmim.cohort import ScanTable, name_scans
    from medmim.identity import identity

    named = name_scans(scans)
    network = load_model(model)
    table = ScanTable(output, classified_classes(network), model=identity(network, modality=modality))
    left = table.without_row(named)

    def add_row(name: str, scan: Path, progress: Callable[[int, int], None]) -> None:
        table.add(name, scan, classify_scan(network, scan, modality=modality and modality.value).values())

    _conclude(output, len(left), _each_scan(left, add_row), already=len(named) - len(left))


def _each_scan(scans: Mapping[str, Path], do: Callable[[str, Path, Callable[[int, int], None]], None]) -> int:
    """Does something to each scan; one that cannot be used is reported and the others go on. Returns how many."""
    failed = 0
    for i, (name, scan) in enumerate(scans.items(), start=1):
        try:
            with progress_bar(f"{i}/{len(scans)} {name}") as progress:
                do(name, scan, progress)
        except ScanError as error:
            report(error)
            failed += 1
    return failed


def _conclude(output: Path, scans: int, failed: int, *, already: int) -> None:
    """Says how many scans the output has now; the exit code is 1 when some failed."""
    _say_done(output, scans - failed, scans, already=already)
    if failed:
        raise typer.Exit(1)


def _say_done(output: Path, done: int, scans: int, *, already: int) -> None:
    skipped = f", {already} were there already" if already else ""
    say(f"{output}: {done} of {scans} scans{skipped}")
