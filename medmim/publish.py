"""From a model to a hub: what would be uploaded, and all of it in one commit.

`plan_upload` asks the hub for its state and sends nothing; `Upload.send` makes the one commit, on the state that was
asked for: when somebody else has published since, the hub refuses it. The hub is the Hugging Face Hub or a mirror of
it, or the local hub that `MEDMIM_HUB` names; then nothing goes anywhere else.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from medmim import __version__, hub
from medmim.errors import SpecError, WeightsError
from medmim.factory import create_decoder, create_model
from medmim.files import Content, atomic_write, size_of
from medmim.golden import golden_outputs
from medmim.localhub import MAIN, LocalHub
from medmim.resolution import resolve
from medmim.saving import save_pretrained
from medmim.spec import ModelSpec, WeightsSpec

CARD, LICENSE = "README.md", "LICENSE"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class State:
    """What a hub has of a repository.

    Attributes:
        commit: The head of the branch, or of main where there is no such branch yet; None without a repository.
        files: Names of the files there.
        has_branch: Whether the branch exists.
    """

    commit: str | None = None
    files: frozenset[str] = frozenset()
    has_branch: bool = False


@dataclass(frozen=True)
class Publication:
    """What was published.

    Attributes:
        spec: The model's, with repository and commit.
        commit: 40 hexadecimal digits, to be named after the "@" of "hf-hub:org/name@".
        url: A page or a folder that shows it.
        pull_request: The page of the pull request that it waits in; None when it was published at once.
    """

    spec: ModelSpec
    commit: str
    url: str
    pull_request: str | None = None


@dataclass(frozen=True)
class Upload:
    """What would be sent, and where to.

    Attributes:
        repo: "org/name".
        spec: Of the model.
        destination: The hub.
        state: What it has of the repository.
        files: What is sent, by its name there.
        kept: Names of files that are there and stay as they are.
        stale: Names of files that belong to an older version and go.
    """

    repo: str
    spec: ModelSpec
    destination: Destination
    state: State
    files: Mapping[str, Content]
    kept: tuple[str, ...]
    stale: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(map(size_of, self.files.values()))

    def send(self, message: str | None = None, *, progress: Progress = lambda done, total: None) -> Publication:
        """Uploads everything, as one commit.

        Args:
            message: Of the commit.
            progress: Called with bytes sent and bytes in all, by a local hub; for others huggingface_hub draws bars.

        Raises:
            WeightsError: When it fails, with the reason and the cure; then nothing is published, or all of it where
                only the answer was lost. To publish again is safe: what is there is not sent twice.
        """
        return self.destination.send(self, message or f"{self.spec.name}, by medmim {__version__}", progress)


class Destination(Protocol):
    """A hub and how to publish to it."""

    def state(self, repo: str) -> State:
        """What it has of a repository."""

    def send(self, upload: Upload, message: str, progress: Progress) -> Publication:
        """Makes one commit."""


# --- what a user calls ------------------------------------------------------------------------------------------------


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
    with atomic_write(folder / hub.GOLDEN) as path:
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
        card: See `push_to_hub`; None takes that of the folder, if it has one.
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
    if spec.weights.golden is None:
        with tempfile.TemporaryDirectory(prefix="medmim-golden-") as folder:
            spec = _write_golden(name, spec, Path(folder))
            files |= {file: (Path(folder) / file).read_bytes() for file in (hub.GOLDEN, hub.CONFIG)}
    spec = hub.as_published(spec, repo, None)

    local = hub.local_hub()
    if local is None:
        destination = _Remote(hub.HubAccess(token=token, endpoint=endpoint), private, tag, revision, create_pr)
    elif endpoint or private or create_pr:
        raise WeightsError(
            f"MEDMIM_HUB={local.root} replaces every other hub, and a folder has neither endpoint, private "
            "repositories nor pull requests; leave them out, or unset MEDMIM_HUB"
        )
    else:
        destination = _Local(local, tag, revision)
    state = destination.state(repo)

    if card is not None:
        files[CARD] = card.encode()
    if CARD in state.files and not replace_card:
        files.pop(CARD, None)
    elif CARD not in files:
        files[CARD] = _card(spec)
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
    missing = [f"weights.{field}" for field in ("license", "volume") if not getattr(spec.weights, field, None)]
    if spec.weights is not None and spec.weights.license.strip().lower() in ("", "unknown"):
        missing = ["weights.license"]
    if missing:
        raise SpecError(
            f"{name} cannot be published: {' and '.join(missing)} missing in its spec; pass weights={{'tag': ..., "
            "'license': ..., 'citation': ..., 'volume': ...} to save_pretrained or push_to_hub"
        )


def _card(spec: ModelSpec) -> bytes:
    from medmim.cards import render_card

    try:
        return render_card(spec).encode()
    except SpecError as error:
        raise SpecError(f"{error}; or write one, as {CARD} of the folder or card=") from None


# --- hubs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Local:
    hub: LocalHub
    tag: str | None
    branch: str

    def __str__(self) -> str:
        return str(self.hub)

    def state(self, repo: str) -> State:
        head = self.hub.head(repo, self.branch)
        commit = head or self.hub.head(repo)
        if commit is None:
            return State()
        folder = self.hub.find(repo, commit).folder
        files = frozenset(path.name for path in folder.iterdir() if path.is_file())
        return State(commit, files, has_branch=head is not None)

    def send(self, upload: Upload, message: str, progress: Progress) -> Publication:
        files = dict(upload.files)
        if upload.kept:
            before = self.hub.find(upload.repo, upload.state.commit).folder
            files |= {name: before / name for name in upload.kept}
        commit = self.hub.publish(
            upload.repo,
            files,
            branches=[self.branch],
            tag=self.tag,
            expected=upload.state.commit if upload.state.has_branch else None,
            progress=progress,
        )
        folder = self.hub.find(upload.repo, commit).folder
        return Publication(hub.as_published(upload.spec, upload.repo, commit), commit, str(folder))


@dataclass(frozen=True)
class _Remote:
    access: hub.HubAccess
    private: bool
    tag: str | None
    branch: str
    create_pr: bool

    def __str__(self) -> str:
        return self.access.address

    @property
    def _api(self):
        from huggingface_hub import HfApi

        return HfApi(
            endpoint=self.access.address,
            token=self.access.token,
            headers=self.access.headers,
            library_name="medmim",
            library_version=__version__,
        )

    def state(self, repo: str) -> State:
        with self._explained(repo, f"publishing {repo}"):
            info = self._info(repo, self.branch) or self._info(repo, MAIN)
            if info is None:
                return State()
            # Not every mirror lists branches and tags, so they are asked for only where they matter.
            refs = self._api.list_repo_refs(repo) if self.tag or self.branch != MAIN else None
        if refs and self.tag in [ref.name for ref in refs.tags]:
            raise WeightsError(f"{repo} on {self} has a tag {self.tag!r} already; choose another")
        if self.private and not info.private:
            raise WeightsError(
                f"{repo} on {self} is there and public; choose another name, or make it private in its settings"
            )
        files = frozenset(sibling.rfilename for sibling in info.siblings or ())
        return State(info.sha, files, has_branch=refs is None or self.branch in [ref.name for ref in refs.branches])

    def _info(self, repo: str, revision: str):
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return self._api.repo_info(repo, revision=revision)
        except HfHubHTTPError as error:
            if error.response.status_code == 404:
                return None
            raise

    def send(self, upload: Upload, message: str, progress: Progress) -> Publication:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        repo, api = upload.repo, self._api
        operations = [
            *(
                CommitOperationAdd(name, str(file) if isinstance(file, Path) else file)
                for name, file in upload.files.items()
            ),
            *(CommitOperationDelete(name) for name in upload.stale),
        ]
        with self._explained(repo, f"publishing {repo}"):
            parent = upload.state.commit
            if parent is None:
                api.create_repo(repo, private=self.private)
                parent = api.repo_info(repo).sha
            if not upload.state.has_branch and self.branch != MAIN:
                api.create_branch(repo, branch=self.branch, revision=parent)
            commit = api.create_commit(
                repo,
                operations,
                commit_message=message,
                revision=self.branch,
                parent_commit=parent,
                create_pr=self.create_pr,
            )
        if self.tag:
            with self._explained(repo, f"tagging {repo}@{commit.oid}, which was published,"):
                api.create_tag(repo, tag=self.tag, revision=commit.oid)
        spec = hub.as_published(upload.spec, repo, commit.oid)
        return Publication(spec, commit.oid, commit.commit_url, commit.pr_url)

    @contextmanager
    def _explained(self, repo: str, what: str) -> Iterator[None]:
        try:
            yield
        # Whatever the client raises: its own errors, those of its HTTP library, of hf_xet.
        except Exception as error:
            raise WeightsError(f"{what} on {self} failed: {_cure(repo, error)}") from error


def _cure(repo: str, error: Exception) -> str:
    """Why an upload failed and what to do, in words."""
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    said = " ".join(str(getattr(error, "server_message", None) or error).split())[:200]
    if re.search(r"xet-\w+-token", str(error)):
        return "the server does not speak Xet; set HF_HUB_DISABLE_XET=1"
    if isinstance(error, errors.HFValidationError):
        return f"{said.rstrip('.')}; choose another name"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the network is off; unset HF_HUB_OFFLINE, or set MEDMIM_HUB to a local hub"
    if isinstance(error, errors.GatedRepoError):
        return "it is gated; ask for access on its page, then set HF_TOKEN or pass token="
    if status == 401:
        return "it takes a token that is valid; run `hf auth login`, set HF_TOKEN or pass token="
    if status == 403:
        owner = repo.partition("/")[0]
        return f"the token may not write to {owner}; use one with write access to it, or another namespace"
    if status == 404:
        return "no such repository or branch, or none that the token may see; check the name and HF_TOKEN"
    if status == 409:
        return f"the name is taken ({said}); push again to see by what"
    if status == 412:
        return "somebody else has published there since; look at what, then push again"
    if "Invalid metadata" in said:
        return f"the server refuses the card ({said}); correct its front matter"
    reason = f"HTTP {status}, {said}" if status else f"{type(error).__name__} {said}"
    return f"{reason}; push again later, or set HF_ENDPOINT to another server or MEDMIM_HUB to a local hub"
