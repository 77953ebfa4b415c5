"""Options and arguments that several commands have, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medmim.cli.options import finite

SourceArgument = Annotated[
    Path, typer.Argument(help="A folder of scans (of a Decathlon folder, imagesTr), or a data list in CSV or JSON.")
]
WhereOption = Annotated[
    list[str] | None, typer.Option(help="Filter on a column of the list: column=pattern,... or column!=pattern,...")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads; default all cores.")]
TflopsOption = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        callback=finite,
        help="TFLOP/s of the hardware, for the time it takes; default as measured.",
    ),
]


def use_threads(threads: int | None) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)
