"""A repository of the Hugging Face Hub as a place for the files of a model.

huggingface_hub checks the length of a download but not its bytes, so every file with a known sha256 is hashed here,
once.
"""

from __future__ import annotations

import contextlib
import errno
import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from medmim import __version__
from medmim.errors import WeightsError
from medmim.files import atomic_write, fault_of
from medmim.spec import FileSpec

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubAccess:
    """How to reach the Hub; None leaves it to huggingface_hub (`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`)."""

    token: str | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    endpoint: str | None = None
    local_files_only: bool = False


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
    access: HubAccess = HubAccess()

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"

    def without_token(self) -> Repository:
        """The same place for keeping: a saved object must not carry the token."""
        return replace(self, access=replace(self.access, token=None))

    def find(self, name: str) -> Path | None:
        """The path of a file in the cache, downloaded when it was not there; None when the repository has none.

        Raises:
            WeightsError: When it cannot be fetched, with the reason and the cure.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            path = hf_hub_download(
                self.repo,
                name,
                revision=self.revision,
                library_name="medmim",
                library_version=__version__,
                token=self.access.token,
                cache_dir=self.access.cache_dir,
                endpoint=self.access.endpoint,
                local_files_only=self.access.local_files_only,
            )
        # Whatever the client raises (its own errors, those of its HTTP library, OSError) means: it did not come.
        except Exception as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            raise WeightsError(self._explain(name, error)) from error
        return Path(path)

    def fetch(self, file: FileSpec) -> Path:
        """The path of a file whose bytes have been checked; a damaged one is deleted and fetched once more.

        Raises:
            WeightsError: When it cannot be fetched, or is another file than `file` describes both times.
        """
        path = self._require(file.name)
        if self._is_remembered(path, file):
            return path
        fault = fault_of(path, sha256=file.sha256, size=file.size)
        if fault and self._is_offline():
            raise WeightsError(f"{path}: damaged in the cache ({fault}); load it once with the network on")
        if fault:
            self._discard(path)
            path = self._require(file.name)
            fault = fault_of(path, sha256=file.sha256, size=file.size)
        if fault:
            raise WeightsError(
                f"{file.name} of {self} from {self._endpoint()} is not the file that was published ({fault}, fetched "
                "twice); the repository has changed or a proxy alters downloads"
            )
        self._remember(path, file)
        return path

    def _require(self, name: str) -> Path:
        path = self.find(name)
        if path is None:
            raise WeightsError(f"{self} has no file {name} at {self._endpoint()}; check the repository and revision")
        return path

    # A digest is remembered in a file of ours beside the repository's blobs, so that it goes when they go. It holds
    # for the size and time that the blob had when it was hashed.

    def _stamp(self, path: Path, file: FileSpec) -> Path:
        # path is REPOSITORY/snapshots/COMMIT/NAME, and NAME may have folders.
        repository = path.parents[len(PurePosixPath(file.name).parts) + 1]
        return repository / ".medmim-verified" / file.sha256

    def _is_remembered(self, path: Path, file: FileSpec) -> bool:
        try:
            return self._stamp(path, file).read_text() == _state_of(path)
        except OSError:
            return False

    def _remember(self, path: Path, file: FileSpec) -> None:
        # A read-only cache is hashed at each load instead.
        with contextlib.suppress(OSError), atomic_write(self._stamp(path, file)) as temporary:
            temporary.write_text(_state_of(path))

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
            raise WeightsError(
                f"{path}: damaged, and cannot be deleted ({error.strerror}); use another cache_dir"
            ) from None

    def _endpoint(self) -> str:
        from huggingface_hub import constants

        return self.access.endpoint or constants.ENDPOINT

    def _is_offline(self) -> bool:
        from huggingface_hub import constants

        return self.access.local_files_only or constants.HF_HUB_OFFLINE

    def _explain(self, name: str, error: Exception) -> str:
        """One sentence: what did not come, why, and what to do."""
        from huggingface_hub import errors

        what = f"{name} of {self} could not be fetched from {self._endpoint()}"
        # A HEAD request that failed is the cause of "not in the cache".
        cause = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        if re.search(r"xet-\w+-token", str(error)):
            return f"{what}: the server does not speak Xet; set HF_HUB_DISABLE_XET=1"
        if isinstance(cause, errors.GatedRepoError):
            return f"{what}: it is gated; ask for access on its page, then set HF_TOKEN or pass token="
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"{what}: there is no such revision; leave it out for the newest"
        if status in (401, 403, 404):
            return f"{what}: no such repository, or a private one; check the name, set HF_TOKEN or pass token="
        if self._is_offline():
            return f"{what}: it is not in the cache and the network is off; fetch it once online, or set MEDMIM_HUB"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return f"{what}: the disk is full; free space, or set HF_HOME or pass cache_dir="
        if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
            return f"{what}: the cache cannot be written ({error.filename}); set HF_HOME or pass cache_dir="
        reason = f"HTTP {status}" if status else " ".join(f"{type(cause).__name__} {cause}".split())[:200]
        return f"{what} ({reason}); try again, or set HF_ENDPOINT to a mirror or MEDMIM_HUB to a local folder"


def _state_of(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"
