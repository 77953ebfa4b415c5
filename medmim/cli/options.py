"""Options and arguments that several commands have, and what is made of them."""

from __future__ import annotations

import math
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmim.files import check_writable

if TYPE_CHECKING:
    from torch import nn

DEFAULT_MODEL = "vit_t_mae3d"


class Modality(StrEnum):
    """What a scan is."""

    CT = "CT"
    MR = "MR"
    PET = "PET"


def finite(value: float | None) -> float | None:
    """Refuses NaN, which no bound of an option does: it is neither above nor below one."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number")
    return value


def _use_hub(folder: Path | None) -> Path | None:
    # Where models are looked for is asked deep below, and workers and subprocesses are to see the same.
    if folder is not None:
        os.environ["MEDMIM_HUB"] = str(folder.absolute())
    return folder


ModelOption = Annotated[
    str, typer.Option("-m", "--model", help="Name of `medmim list --pretrained`, hf-hub:ORG/NAME or local-dir:PATH.")
]
TaskModelOption = Annotated[
    str, typer.Option("-m", "--model", help="A model that was fine-tuned: local-dir:PATH or hf-hub:ORG/NAME.")
]
ScansArgument = Annotated[
    list[Path], typer.Argument(help="NIfTI, NRRD or MHA files, DICOM series, or folders of scans at any depth.")
]
ModalityOption = Annotated[
    Modality | None, typer.Option(case_sensitive=False, help="What the scan is; without it, taken from the scan.")
]
RatioOption = Annotated[float, typer.Option(min=0.05, max=0.95, callback=finite, help="Share of the patches to hide.")]
HubOption = Annotated[
    Path | None, typer.Option(help="Folder that replaces the Hugging Face Hub, as MEDMIM_HUB does.", callback=_use_hub)
]


def check_output(path: Path, suffix: str, *, otherwise: str = "") -> None:
    """Refuses a file that has another suffix or cannot be written, before anything is computed for it.

    Args:
        path: What was given.
        suffix: That it must have.
        otherwise: What it may be instead, for the error.
    """
    if path.suffix.lower() != suffix:
        raise typer.BadParameter(f"{path} must end in {suffix}{otherwise and f', or {otherwise}'}", param_hint="-o")
    check_writable(path)


def load_model(name: str) -> nn.Module:
    """A model with its weights, on a GPU where there is one; else this process is made ready to compute."""
    import torch

    from medmim.factory import create_model
    from medmim.memory import keep_freed_memory

    keep_freed_memory()
    return create_model(name, pretrained=True, device="cuda" if torch.cuda.is_available() else None)
