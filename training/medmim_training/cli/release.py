"""`medmim-train package` and `publish`: a finished run becomes a model for others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medmim.cli import pushing
from medmim.cli.options import HubOption
from medmim.cli.terminal import say
from medmim.errors import SpecError

if TYPE_CHECKING:
    from medmim.spec import ModelSpec

RunArgument = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
DataOption = Annotated[Path, typer.Option(help="Store that the run was trained on.")]
TagOption = Annotated[str, typer.Option(help="Names the training data: [a-z0-9_]+.")]
LicenseOption = Annotated[str, typer.Option(help="SPDX identifier, the strictest of the training data.")]
CitationOption = Annotated[Path, typer.Option(help="BibTeX file.")]
EvidenceOption = Annotated[Path | None, typer.Option(help="Results of `medmim-train evaluate` for the card.")]


def package(
    run: RunArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="Model folder to write.")] = ...,
    data: DataOption = ...,
    tag: TagOption = ...,
    license: LicenseOption = ...,
    citation: CitationOption = ...,
    evidence: EvidenceOption = None,
) -> None:
    """Makes a model folder from a finished run: weights, config, golden outputs, data list, card, catalog entry.

    Example: `medmim-train package runs/vit_t -o vit_t --data store --tag ours --license CC-BY-4.0 --citation us.bib`
    """
    from medmim.publish import catalog_file
    from medmim_training.publish import ENTRY_FILE

    spec = _package(run, out, data, tag, license, citation, evidence)
    say(f"{spec.name}: {out}")
    say(f'try it: medmim.create_model("local-dir:{out}", pretrained=True)')
    say(f"for the catalog: {out / ENTRY_FILE} is {catalog_file(spec)} of a checkout")


def publish(
    run: RunArgument,
    repo: Annotated[str, typer.Argument(help="ORG/NAME.")],
    data: DataOption = ...,
    tag: TagOption = ...,
    license: LicenseOption = ...,
    citation: CitationOption = ...,
    evidence: EvidenceOption = None,
    card: pushing.CardOption = None,
    replace_card: pushing.ReplaceCardOption = False,
    private: pushing.PrivateOption = False,
    version: Annotated[str | None, typer.Option(help="A name for this version, a tag of the repository.")] = None,
    revision: pushing.RevisionOption = "main",
    pull_request: pushing.PullRequestOption = False,
    message: pushing.MessageOption = None,
    token: pushing.TokenOption = None,
    endpoint: pushing.EndpointOption = None,
    hub: HubOption = None,
    dry_run: pushing.DryRunOption = False,
) -> None:
    """Publishes a finished run as one commit: what `package` makes, and the recipe.

    The data list names the file of every scan: see with --dry-run what goes, and that the names say nothing they
    should not.

    Example: `medmim-train publish runs/vit_t org/vit_t --data store --tag ours --license CC-BY-4.0 --citation us.bib`
    """
    import tempfile

    from medmim_training.publish import CARD_FILE

    with tempfile.TemporaryDirectory(prefix="medmim-publish-") as folder:
        _package(run, Path(folder), data, tag, license, citation, evidence)
        (Path(folder) / CARD_FILE).unlink()  # it is made again, with the name of the repository
        pushing.push(
            f"local-dir:{folder}",
            repo,
            card=card,
            message=message,
            dry_run=dry_run,
            replace_card=replace_card,
            private=private,
            tag=version,
            revision=revision,
            create_pr=pull_request,
            token=token,
            endpoint=endpoint,
        )


def _package(
    run: Path, out: Path, data: Path, tag: str, license: str, citation: Path, evidence: Path | None
) -> ModelSpec:
    from medmim.limits import CONFIG_BYTES, read_json, read_text
    from medmim.spec import Evidence
    from medmim_training.publish import package as make_folder
    from medmim_training.store.index import Store

    results = read_json(evidence, CONFIG_BYTES) if evidence else []
    if not isinstance(results, list):
        raise SpecError(f"{evidence}: must be the list of results that `medmim-train evaluate` writes")
    return make_folder(
        run,
        out,
        store=Store(data),
        tag=tag,
        license=license,
        citation=read_text(citation, CONFIG_BYTES),
        evidence=tuple(Evidence.parse(result, source=str(evidence)) for result in results),
    )
