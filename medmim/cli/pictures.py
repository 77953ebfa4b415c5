"""`medmim reconstruct` and `medmim demo`: pictures of what a model predicts where it saw nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from medmim.cli.options import (
    DEFAULT_MODEL,
    HubOption,
    ModalityOption,
    ModelOption,
    RatioOption,
    check_output,
    load_model,
)
from medmim.cli.terminal import console, new_table, progress_bar, say
from medmim.files import check_writable


def reconstruct(
    scan: Annotated[Path, typer.Argument(help="A NIfTI, NRRD or MHA file, or the folder of one DICOM series.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file to write.")],
    model: ModelOption = DEFAULT_MODEL,
    ratio: RatioOption = 0.75,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Decides which patches are hidden.")] = 0,
    modality: ModalityOption = None,
    hub: HubOption = None,
) -> None:
    """Hides patches of a scan, predicts them, and draws scan, visible part, reconstruction and error.

    Example: `medmim reconstruct chest.nii.gz -o chest.png --ratio 0.75`
    """
    check_output(output, ".png")
    import torch

    from medmim.factory import create_decoder
    from medmim.pictures import reconstruction_picture
    from medmim.reconstruction import compare, reconstruct_scan

    encoder = load_model(model)
    decoder = create_decoder(encoder)
    generator = torch.Generator().manual_seed(seed)
    with progress_bar(scan.name) as progress:
        result, spacing = reconstruct_scan(
            encoder,
            decoder,
            scan,
            modality=modality and modality.value,
            ratio=ratio,
            generator=generator,
            progress=progress,
        )
    errors = compare(result)
    orientation = encoder.spec.weights.volume.orientation
    reconstruction_picture(result, output, spacing=spacing, orientation=orientation, title=scan.name)
    table = new_table("fill", "normalised MSE")
    for name, error in errors.items():
        table.add_row(name, _number(error))
    console.print(table)
    say(str(output))


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("medmim-demo"),
    model: ModelOption = DEFAULT_MODEL,
    hub: HubOption = None,
) -> None:
    """Reconstructs and embeds the sample scans, in less than a minute.

    Example: `medmim demo -o medmim-demo`
    """
    from medmim.demo import run_demo
    from medmim.memory import keep_freed_memory

    keep_freed_memory()
    check_writable(output / "features.safetensors")
    with progress_bar("sample scans") as progress:
        result = run_demo(output, model=model, progress=progress)
    table = new_table("scan", "picture", *result.scans[0].errors)
    for scan in result.scans:
        table.add_row(scan.name, str(scan.picture), *map(_number, scan.errors.values()))
    console.print(table)
    say("Numbers: mean squared error over the hidden 75 %, divided by their variance; 0 is perfect.")
    say(f"Features: {result.features}")


def _number(error: float) -> str:
    """An error to three places, or a dash where nothing of the scan was hidden, as in one of a single patch."""
    return "-" if math.isnan(error) else f"{error:.3f}"
