"""Sending a model to a hub: the Hugging Face Hub, a mirror of it, or a local hub; each takes it in one commit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medmim import __version__, hub
from medmim.errors import WeightsError
from medmim.files import Content, size_of
from medmim.guards import watch_answers
from medmim.localhub import MAIN, LocalHub
from medmim.spec import ModelSpec

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


@dataclass(frozen=True)
class LocalDestination:
    """A local hub, whose branch is to get the model and a tag, if any."""

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
            before = hub.in_local_hub(self.hub, self.hub.find(upload.repo, upload.state.commit))
            files |= {name: path for name in upload.kept if (path := before.find(name)) is not None}
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
class RemoteDestination:
    """The Hugging Face Hub or a mirror of it.

    Attributes:
        access: How to reach it.
        private: Whether a new repository is to be private.
        tag: A name for the version, if any.
        branch: Which is to get the model.
        create_pr: Opens a pull request instead.
    """

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

        watch_answers()
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
