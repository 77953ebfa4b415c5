"""`medmim cards` and `medmim push`: the model cards of the catalog, and a model that goes to a hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from medmim.cli import pushing
from medmim.cli.options import HubOption
from medmim.cli.terminal import report, say


def cards(
    folder: Annotated[Path, typer.Argument(help="Where the cards are.")] = Path("model_cards"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail when a card is stale.")] = False,
) -> None:
    """Writes the model cards of the catalog, from the records of the weights.

    Example: `medmim cards --check`
    """
    from medmim.cards.catalog import check_cards, write_cards

    if not check:
        for path in write_cards(folder):
            say(str(path))
    problems = check_cards(folder)
    for problem in problems:
        report(problem)
    if problems:
        raise typer.Exit(1)


def push(
    source: Annotated[str, typer.Argument(help="A model folder, or a name of `medmim list --pretrained`.")],
    repo: Annotated[str, typer.Argument(help="ORG/NAME.")],
    card: pushing.CardOption = None,
    replace_card: pushing.ReplaceCardOption = False,
    private: pushing.PrivateOption = False,
    tag: pushing.TagOption = None,
    revision: pushing.RevisionOption = "main",
    pull_request: pushing.PullRequestOption = False,
    message: pushing.MessageOption = None,
    token: pushing.TokenOption = None,
    endpoint: pushing.EndpointOption = None,
    hub: HubOption = None,
    dry_run: pushing.DryRunOption = False,
) -> None:
    """Publishes a model folder as one commit: to the Hugging Face Hub, a mirror of it, or a local hub.

    Says first what is uploaded and how large it is; then the commit, and the entry for a catalog.

    Example: `medmim push my-model org/name --private --dry-run`
    """
    pushing.push(
        f"local-dir:{source}" if os.path.isdir(source) else source,
        repo,
        card=card,
        message=message,
        dry_run=dry_run,
        replace_card=replace_card,
        private=private,
        tag=tag,
        revision=revision,
        create_pr=pull_request,
        token=token,
        endpoint=endpoint,
    )
