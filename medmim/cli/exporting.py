"""`medmim export`: a model in a form that others load."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from medmim.cli.options import HubOption, check_output
from medmim.cli.terminal import say


class Form(StrEnum):
    """What a model can be exported to."""

    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"
    MONAI_BUNDLE = "monai-bundle"


SUFFIXES = {Form.ONNX: ".onnx", Form.TORCH_EXPORT: ".pt2"}


def export_command(
    name: Annotated[
        str, typer.Argument(help="A name of `medmim list --pretrained`, hf-hub:ORG/NAME or local-dir:PATH.")
    ],
    to: Annotated[Form, typer.Option("--to", help="ONNX, a .pt2 file of torch.export, or a folder for MONAI.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write; for monai-bundle a folder.")],
    hub: HubOption = None,
) -> None:
    """Writes a model with its weights in a form that others load.

    Example: `medmim export vit_t_mae3d --to onnx -o vit_t.onnx`
    """
    if to in SUFFIXES:
        check_output(output, SUFFIXES[to])
    from medmim.export import export_model
    from medmim.factory import create_model

    export_model(create_model(name, pretrained=True), output, to=to.value)
    say(str(output))
