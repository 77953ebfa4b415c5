"""What `medmim push` and `medmim-train publish` have in common: their options, and what they say before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from medmim.cli.terminal import Terminal, console, say
from medmim.errors import SpecError
from medmim.files import size_of
from medmim.limits import UTF8

CardOption = Annotated[Path | None, typer.Option(help="Markdown file; without it, a card is made from the record.")]
ReplaceCardOption = Annotated[bool, typer.Option("--replace-card", help="Replaces the card that is there.")]
PrivateOption = Annotated[bool, typer.Option("--private", help="Makes a new repository private.")]
TagOption = Annotated[str | None, typer.Option(help="A name for this version.")]
RevisionOption = Annotated[str, typer.Option(help="The branch; made when there is none.")]
PullRequestOption = Annotated[bool, typer.Option("--pull-request", help="Opens a pull request instead.")]
MessageOption = Annotated[str | None, typer.Option(help="Of the commit.")]
TokenOption = Annotated[
    str | None, typer.Option(help="Of somebody who may write; default that of `hf auth login` or HF_TOKEN.")
]
EndpointOption = Annotated[str | None, typer.Option(help="A mirror of the Hub; default HF_ENDPOINT or huggingface.co.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only says what would be uploaded.")]


def push(name: str, repo: str, *, card: Path | None, message: str | None, dry_run: bool, **options: Any) -> None:
    """Says what goes where, uploads it, and says what came of it.

    Args:
        name: Of the model, as `create_model` takes it.
        repo: "org/name".
        card: A file to take the card from.
        message: Of the commit.
        dry_run: Ends before anything is sent.
        **options: See `medmim.publish.plan_upload`.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from medmim.publish import catalog_entry, catalog_file, plan_upload

    try:
        text = card.read_text(encoding=UTF8) if card else None
    except UnicodeDecodeError:
        raise SpecError(f"{card}: not a text; save it as UTF-8") from None
    upload = plan_upload(name, repo, card=text, **options)
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    sizes = {name: size_of(content) for name, content in sorted(upload.files.items())}
    for name, size in {**sizes, "in all": upload.size}.items():
        table.add_row(name, f"{size:,} bytes")
    state = "a new repository" if upload.state.commit is None else f"now at {upload.state.commit}"
    say(f"{upload.spec.name} to {repo} at {upload.destination}, {state}:")
    console.print(table)
    if upload.kept:
        say(f"stays as it is there: {', '.join(upload.kept)} (--replace-card replaces the card)")
    if upload.stale:
        say(f"goes, being of an older version: {', '.join(upload.stale)}")
    if dry_run:
        say("nothing was sent")
        return

    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn()
    terminal = Terminal(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(repo, total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        published = upload.send(message, progress=progress)
    say(f"{'pull request' if published.pull_request else 'published'}: {published.pull_request or published.url}")
    say(f'to load it: medmim.create_model("hf-hub:{repo}@{published.commit}", pretrained=True)')
    if published.spec.task is None:  # the catalog has encoders
        spec = published.spec
        say(
            f'for the catalog: "{spec.weights.tag}" among the weights of {spec.architecture}, and '
            f"{catalog_file(spec)}:\n\n{catalog_entry(spec)}"
        )
