"""A repository of the Hugging Face Hub as a place for the files of a model.

huggingface_hub checks the length of a download but not its bytes. Here they are: by the sha256 of a record of weights
where there is one, else by the ETag, which for the Hub is a digest too. A damaged file is fetched once more.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from medmim import transport
from medmim.access import HubAccess
from medmim.errors import WeightsError
from medmim.spec import FileSpec
from medmim.verified import fault_unless_noted


@dataclass(frozen=True)
class Repository:
    """A model folder in a Hub repository.

    Attributes:
        repo: "org/name".
        revision: A commit, tag or branch; a commit that is cached costs no request.
        access: How to reach it.
    """

    repo: str
    revision: str = "main"
    access: HubAccess = field(default_factory=HubAccess)

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"

    def for_keeping(self) -> Repository:
        """The same place, without the token: a saved object must not carry it."""
        return replace(self, access=replace(self.access, token=None))

    def find(self, name: str) -> Path | None:
        """The path of a file in the cache, downloaded when it was not there; None when the repository has none.

        Raises:
            WeightsError: When it cannot be fetched, with the reason and the cure, or came damaged twice.
        """
        path = self._download(name)
        etag = None if path is None else _etag_of(path)
        if etag is None:
            return path
        if len(etag) == 64:
            return self._check(path, name, etag, None)
        return self._replace_damaged(path, name, lambda path: _git_fault_of(path, etag))

    def fetch(self, file: FileSpec) -> Path:
        """The path of a file whose bytes have been checked; a damaged one is deleted and fetched once more.

        Raises:
            WeightsError: When it cannot be fetched, or is another file than `file` describes both times.
        """
        return self._check(self._require(file.name), file.name, file.sha256, file.size)

    def _download(self, name: str) -> Path | None:
        return transport.download(self.repo, self.revision, name, self.access)

    def _require(self, name: str) -> Path:
        path = self._download(name)
        if path is None:
            raise WeightsError(f"{self} has no file {name} at {self.access.address}; check the repository and revision")
        return path

    def _check(self, path: Path, name: str, sha256: str, size: int | None) -> Path:
        note = self._notes(path, name) / sha256
        return self._replace_damaged(path, name, lambda path: fault_unless_noted(path, note, sha256=sha256, size=size))

    def _replace_damaged(self, path: Path, name: str, find_fault: Callable[[Path], str | None]) -> Path:
        fault = _fault_now(find_fault, path)
        if fault is None:
            return path
        if self.access.is_offline:
            raise WeightsError(f"{path}: damaged in the cache ({fault}); load it once with the network on")
        with self._alone(path, name):
            path = self._require(name)
            if _fault_now(find_fault, path) is not None:  # unless another process has replaced it meanwhile
                self._discard(path)
                path = self._require(name)
            fault = _fault_now(find_fault, path)
        if fault is not None:
            raise WeightsError(
                f"{name} of {self} from {self.access.address} is not the file that was "
                f"published ({fault}, fetched twice); the repository has changed or a proxy alters downloads"
            )
        return path

    def _notes(self, path: Path, name: str) -> Path:
        """Where notes of the files that were found right are: beside the repository's blobs, to go when they go."""
        # path is REPOSITORY/snapshots/COMMIT/NAME, and NAME may have folders.
        return path.parents[len(PurePosixPath(name).parts) + 1] / ".medmim-verified"

    @contextlib.contextmanager
    def _alone(self, path: Path, name: str) -> Iterator[None]:
        """Keeps other processes from replacing a file of the repository at the same time."""
        from huggingface_hub.utils import WeakFileLock

        notes = self._notes(path, name)
        with contextlib.ExitStack() as stack:
            try:
                notes.mkdir(parents=True, exist_ok=True)
                stack.enter_context(WeakFileLock(notes / ".lock"))
            except OSError as error:
                raise _undeletable(path, error) from None
            yield

    @staticmethod
    def _discard(path: Path) -> None:
        """Deletes a file of the cache and the blobs behind it: a snapshot links to a blob, which may link on."""
        try:
            while path.is_symlink():
                target = path.parent / path.readlink()
                path.unlink()
                path = target
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _undeletable(path, error) from None


def _fault_now(find_fault: Callable[[Path], str | None], path: Path) -> str | None:
    try:
        return find_fault(path)
    except FileNotFoundError:  # another process found it damaged a moment ago
        return "it was deleted"


def _undeletable(path: Path, error: OSError) -> WeightsError:
    return WeightsError(f"{path}: damaged, and cannot be deleted ({error.strerror}); use another cache_dir")


def _etag_of(path: Path) -> str | None:
    """The digest that the server gave a file of the cache, which its blob is named by; None when it gave none."""
    try:
        name = path.readlink().name
    except OSError:  # a copy, where there are no links
        return None
    return name if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", name) else None


def _git_fault_of(path: Path, etag: str) -> str | None:
    """How a small file differs from its ETag: on the Hub the name of the git object, of some proxies the sha1."""
    git, plain = hashlib.sha1(f"blob {path.stat().st_size}\0".encode()), hashlib.sha1()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            git.update(piece)
            plain.update(piece)
    if etag in (git.hexdigest(), plain.hexdigest()):
        return None
    return f"its digest in git is {git.hexdigest()}, expected {etag}"
