"""`medmim embed`, `segment` and `classify`: what a model makes of many scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from medmim.cli.options import (
    DEFAULT_MODEL,
    HubOption,
    ModalityOption,
    ModelOption,
    ScansArgument,
    TaskModelOption,
    check_output,
    load_model,
)
from medmim.cli.terminal import progress_bar, report, say
from medmim.errors import ScanError


def embed(
    scans: ScansArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Safetensors file to write.")],
    model: ModelOption = DEFAULT_MODEL,
    modality: ModalityOption = None,
    hub: HubOption = None,
) -> None:
    """Writes the dense features and one pooled vector of each scan.

    A scan is called by its file name without the suffix, or by its path in the folder that was given. One that cannot
    be used is reported and the others go on; the exit code is then 1. Features are written at the end, or when the run
    is stopped (Ctrl-C) or fails: those of the scans that were done.

    Example: `medmim embed scans/ -o features.safetensors`
    """
    check_output(output, ".safetensors")
    from medmim.cohort import name_scans
    from medmim.inference import embed as embed_scan
    from medmim.inference import save_embeddings

    named = name_scans(scans)
    encoder = load_model(model)
    embeddings = {}

    def add(name: str, scan: Path, progress: Callable[[int, int], None]) -> None:
        embeddings[name] = embed_scan(encoder, scan, modality=modality and modality.value, progress=progress)

    try:
        _each_scan(named, add)
    finally:  # hours of work are not lost to what ends the rest
        if embeddings:
            save_embeddings(output, embeddings)
        _say_done(output, len(embeddings), len(named))
    if len(embeddings) < len(named):
        raise typer.Exit(1)


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
    from medmim.cohort import ScanTable, name_scans, place_masks
    from medmim.identity import identity
    from medmim.segmentation import read_segmentation, segmented_classes
    from medmim.segmentation import segment as segment_scan

    named = name_scans(scans, outside=output)
    masks = place_masks(named, output)
    network = load_model(model)
    classes = segmented_classes(network)
    made_by = identity(network)
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
    table = ScanTable(output, classified_classes(network), model=identity(network))
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


def _conclude(output: Path, scans: int, failed: int, *, already: int = 0) -> None:
    """Says how many scans the output has now; the exit code is 1 when some failed."""
    _say_done(output, scans - failed, scans, already=already)
    if failed:
        raise typer.Exit(1)


def _say_done(output: Path, done: int, scans: int, *, already: int = 0) -> None:
    skipped = f", {already} were there already" if already else ""
    say(f"{output}: {done} of {scans} scans{skipped}")
