"""`medmim mirror` and `medmim verify`: weights are copied, and compared with what was published."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from medmim.cli.options import HubOption
from medmim.cli.terminal import progress_bar, report, say
from medmim.errors import MedmimError, WeightsError


def mirror(
    names: Annotated[
        list[str], typer.Argument(help="Names of `medmim list --pretrained`, with wildcards, or hf-hub:ORG/NAME[@REV].")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the local hub; made when there is none.")],
    hub: HubOption = None,
) -> None:
    """Copies weights, with all that was published beside them and the digests, into a folder for a site without a hub.

    There, `MEDMIM_HUB=FOLDER` or `--hub FOLDER` makes the same names load from it.

    Example: `medmim mirror "vit_*" hf-hub:org/name -o /media/stick/hub`
    """
    from medmim.mirror import mirror as copy
    from medmim.registry import list_pretrained

    failed = False
    for name in dict.fromkeys(full for pattern in names for full in list_pretrained(pattern) or [pattern]):
        try:
            with progress_bar(name) as progress:
                version = copy(name, output, progress=progress)
            say(f"{version.repo}@{version.name}: {version.folder}")
        except MedmimError as error:
            report(error)
            failed = True
    if failed:
        raise typer.Exit(1)


def verify(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Names, hf-hub:ORG/NAME[@REV], model folders, local hubs; default all that is installed."),
    ] = None,
    hub: HubOption = None,
) -> None:
    """Hashes every file of weights and compares what the model computes with what it did when it was published.

    Prints a line for each; the exit code is 1 when something is not as published, or could not be checked.

    Example: `medmim verify vit_t_mae3d /data/hub`
    """
    from medmim.verify import installed, models_in
    from medmim.verify import verify as check

    names, checks, faults, unchecked = [], 0, 0, False
    for source in sources or installed():
        try:
            names += models_in(source) if os.path.isdir(source) else [source]
        except MedmimError as error:
            report(error)
            unchecked = True
    for name in names:
        try:
            for found in check(name):
                checks += 1
                faults += found.fault is not None
                say(f"{name}: {found.item}: {found.fault or 'ok'}")
        except MedmimError as error:  # it could not be fetched, say, which is no fault of the weights
            report(error)
            unchecked = True
    if faults:
        raise WeightsError(
            f"{faults} of {checks} are not as published; copy a damaged file again, or delete it from the cache of the "
            "Hub to have it fetched again"
        )
    if unchecked:
        raise typer.Exit(1)
