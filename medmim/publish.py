"""From a model to a hub: what would be uploaded, and all of it in one commit.

`plan_upload` asks the hub for its state and sends nothing; `Upload.send` makes the one commit, on the state that was
asked for: when somebody else has published since, the hub refuses it. The hub is the Hugging Face Hub or a mirror of
it, or the local hub that `MEDMIM_HUB` names; then nothing goes anywhere else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from medmim import hub
from medmim.errors import SpecError, WeightsError
from medmim.factory import create_decoder, create_model
from medmim.files import Content, atomic_write, output_errors
from medmim.golden import golden_outputs
from medmim.localhub import MAIN
from medmim.resolution import resolve
from medmim.saving import save_pretrained
from medmim.spec import ModelSpec, WeightsSpec
from medmim.upload import LocalDestination, Publication, RemoteDestination, Upload

CARD, LICENSE = "README.md", "LICENSE"


def push_to_hub(
    model: nn.Module,
    repo: str,
    *,
    decoder: nn.Module | None = None,
    weights: WeightsSpec | Mapping[str, Any] | None = None,
    card: str | None = None,
    replace_card: bool = False,
    private: bool = False,
    tag: str | None = None,
    revision: str = MAIN,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Publication:
    """Publishes a model, as one commit: weights, config, golden outputs and card, so that a stranger can load it.

    Args:
        model: A model from `create_model`; its dtype is kept.
        repo: "org/name"; made when there is none.
        decoder: See `save_pretrained`.
        weights: See `save_pretrained`; what is published needs a licence and an input contract (`volume`).
        card: Markdown; None makes it from the record of the weights.
        replace_card: Replaces the card that the repository has, which is otherwise kept.
        private: Makes a new repository private.
        tag: A name for this version, which must be free.
        revision: The branch; made from main when there is none.
        create_pr: Opens a pull request instead of changing the branch.
        commit_message: Of the commit.
        token: Of somebody who may write there; None for the one of `hf auth login` or `HF_TOKEN`.
        endpoint: A mirror of the Hub; None for `HF_ENDPOINT` or huggingface.co.

    Returns:
        The commit, and the spec with it.

    Raises:
        SpecError: For a record that lacks something, which the message names.
        WeightsError: When the hub refuses, with the reason and the cure; nothing is published then.
    """
    with tempfile.TemporaryDirectory(prefix="medmim-push-") as folder:
        save_with_golden(model, folder, decoder=decoder, weights=weights)
        upload = plan_upload(
            f"local-dir:{folder}",
            repo,
            card=card,
            replace_card=replace_card,
            private=private,
            tag=tag,
            revision=revision,
            create_pr=create_pr,
            token=token,
            endpoint=endpoint,
        )
        return upload.send(commit_message)


def save_with_golden(
    model: nn.Module,
    folder: str | Path,
    *,
    decoder: nn.Module | None = None,
    weights: WeightsSpec | Mapping[str, Any] | None = None,
) -> ModelSpec:
    """`save_pretrained`, and golden outputs: of what was saved, loaded back as others will load it.

    Raises:
        SpecError: Also for a record that nothing can be published with.
    """
    spec = save_pretrained(model, folder, decoder=decoder, weights=weights)
    _require_record(spec, spec.name)
    return _write_golden(f"local-dir:{folder}", spec, Path(folder))


def _write_golden(name: str, spec: ModelSpec, folder: Path) -> ModelSpec:
    """Writes golden outputs of a model that has none, and the config that names them."""
    from safetensors.torch import save_file

    model = create_model(name, pretrained=True)
    outputs = golden_outputs(model, create_decoder(model) if spec.weights.decoder is not None else None)
    with output_errors(folder / hub.GOLDEN), atomic_write(folder / hub.GOLDEN) as path:
        save_file(outputs, path)
    golden = hub.describe_file(folder, hub.GOLDEN)
    spec = spec.model_copy(update={"weights": spec.weights.model_copy(update={"golden": golden})})
    hub.write_config(folder, spec)
    return spec


def plan_upload(
    name: str,
    repo: str,
    *,
    card: str | None = None,
    replace_card: bool = False,
    private: bool = False,
    tag: str | None = None,
    revision: str = MAIN,
    create_pr: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> Upload:
    """What publishing a model would send; asks the hub, sends nothing.

    A model that was saved without golden outputs gets some: of its files, loaded as others will load them.

    Args:
        name: As `create_model` takes it: "local-dir:path", a name of the catalog, "hf-hub:org/name".
        repo: See `push_to_hub`, as all others.
        card: See `push_to_hub`; None takes that of the folder, if somebody wrote one.
        replace_card: See `push_to_hub`.
        private: See `push_to_hub`.
        tag: See `push_to_hub`.
        revision: See `push_to_hub`.
        create_pr: See `push_to_hub`.
        token: See `push_to_hub`.
        endpoint: See `push_to_hub`.

    Raises:
        UnknownModelError: For a name that does not exist.
        SpecError: For a record that lacks something, which the message names.
        WeightsError: For files that are missing or damaged, or when the hub refuses.
    """
    if not hub.REPOSITORY.fullmatch(repo):
        raise WeightsError(f"{repo!r} is not the name of a repository; it is written org/name")
    if create_pr and (tag or revision != MAIN):
        raise WeightsError("a pull request goes to main and gets its tag when it is merged; leave tag and revision out")
    spec, place = resolve(name, None, hub.HubAccess(), needs_weights=True)
    _require_record(spec, name)
    files: dict[str, Content] = {**hub.fetch_all(place, spec)}
    if hub.CONFIG not in files:
        raise WeightsError(f"{place} has no {hub.CONFIG}; save the model again")
    if CARD in files and _is_made(files[CARD], spec, files):
        del files[CARD]  # it is made again, with the name of the repository
    if spec.weights.golden is None:
        with tempfile.TemporaryDirectory(prefix="medmim-golden-") as folder:
            spec = _write_golden(name, spec, Path(folder))
            files |= {file: (Path(folder) / file).read_bytes() for file in (hub.GOLDEN, hub.CONFIG)}
    spec = hub.as_published(spec, repo, None)

    local = hub.local_hub()
    if local is None:
        destination = RemoteDestination(
            hub.HubAccess(token=token, endpoint=endpoint), private, tag, revision, create_pr
        )
    elif endpoint or private or create_pr:
        raise WeightsError(
            f"MEDMIM_HUB={local.root} replaces every other hub, and a folder has neither endpoint, private "
            "repositories nor pull requests; leave them out, or unset MEDMIM_HUB"
        )
    else:
        destination = LocalDestination(local, tag, revision)
    state = destination.state(repo)

    if card is not None:
        files[CARD] = card.encode()
    if CARD in state.files and not replace_card:
        files.pop(CARD, None)
    elif CARD not in files:
        files[CARD] = _card(spec, files)
    kept = tuple(file for file in (CARD, LICENSE) if file in state.files and file not in files)
    stale = [
        file for file in state.files if file not in files and any(fnmatchcase(file, like) for like in hub.OF_WEIGHTS)
    ]
    return Upload(repo, spec, destination, state, files, kept, tuple(sorted(stale)))


def catalog_entry(spec: ModelSpec) -> str:
    """The record of a model's weights as TOML: the file `catalog_file(spec)` of a checkout.

    Runs that one model went through mostly share their data, which the TOML lists once (see `TrainingRecord`).
    """
    import tomli_w

    entry = spec.weights.to_data()
    run = entry.get("training", {})
    data = run.get("data")
    while run := run.get("before"):
        if run["data"] == data:
            del run["data"]
        else:
            data = run["data"]
    return tomli_w.dumps(entry)


def catalog_file(spec: ModelSpec) -> str:
    """Where the catalog has the record of a model's weights, in a checkout."""
    return f"medmim/catalog/weights/{spec.name}.toml"


def _require_record(spec: ModelSpec, name: str) -> None:
    """What nobody should publish without: terms of use, and what the weights expect."""
    missing = None
    if spec.weights is None:
        missing = "weights.license and weights.volume"
    elif spec.weights.license.strip().lower() in ("", "unknown"):
        missing = "weights.license"
    if missing:
        raise SpecError(
            f"{name} cannot be published: {missing} missing in its spec; pass weights={{'tag': ..., "
            "'license': ..., 'citation': ..., 'volume': ...} to save_pretrained or push_to_hub"
        )


def _is_made(card: Path, spec: ModelSpec, files: Mapping[str, Content]) -> bool:
    """Whether a card is just what is made from the record."""
    try:
        return card.read_bytes() == _card(spec, files)
    except SpecError:  # of such a record none is made
        return False


def _card(spec: ModelSpec, files: Mapping[str, Content]) -> bytes:
    from medmim.cards import render_card
    from medmim.cards.encoder import DATA_FILE, PICTURE_FILE

    try:
        picture = PICTURE_FILE if PICTURE_FILE in files else None
        return render_card(spec, picture=picture, has_data_list=DATA_FILE in files).encode()
    except SpecError as error:
        raise SpecError(f"{error}; or write one, as {CARD} of the folder or card=") from None
