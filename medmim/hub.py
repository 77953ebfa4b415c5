"""Where the files of a model come from, and the check that they are the right ones.

A model folder holds `config.json` (a ModelSpec), safetensors files and what goes with them. It is a folder on this
disk or a repository of the Hugging Face Hub; for weights of the catalog the order is `medmim/weights/NAME/`, which
ships with the source, then the Hub's cache, then the Hub. `MEDMIM_HUB` replaces the Hub's namespace by another one
("hospital"), or the Hub by a local folder ("/data/hub", "./hub") that has `org/name/` inside.

huggingface_hub checks the length of a download but not its bytes, so every file with a known sha256 is hashed here:
files on this disk at each load, downloads once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from medmim import __version__
from medmim.errors import SpecError, WeightsError
from medmim.files import atomic_write, sha256_of
from medmim.spec import FileSpec, ModelSpec, WeightsSpec

PACKAGED = Path(__file__).parent / "weights"
CONFIG, ENCODER = "config.json", "model.safetensors"
JSON_BYTES = 1_000_000  # a config or an index of ours has a few thousand
COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class HubAccess:
    """How to reach the Hub; None leaves it to huggingface_hub (`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`)."""

    token: str | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    endpoint: str | None = None
    local_files_only: bool = False


# --- places -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """A model folder on this disk."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def without_token(self) -> Folder:
        """Itself: a folder needs no token."""
        return self

    def find(self, name: str) -> Path | None:
        """The path of a file, None when there is none."""
        path = self.path / name
        return path if path.is_file() else None

    def fetch(self, file: FileSpec) -> Path:
        """The path of a file whose bytes have been checked.

        Raises:
            WeightsError: When it is missing or is another file than `file` describes.
        """
        path = self.find(file.name)
        if path is None:
            raise WeightsError(f"{self.path}: {file.name} is missing; copy or save the model again")
        fault = _fault(path, file)
        if fault:
            raise WeightsError(f"{path}: damaged ({fault}); copy or save the model again")
        return path


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
        fault = _fault(path, file)
        if fault and self._is_offline():
            raise WeightsError(f"{path}: damaged in the cache ({fault}); load it once with the network on")
        if fault:
            self._discard(path)
            path = self._require(file.name)
            fault = _fault(path, file)
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


Place = Folder | Repository


def place_of_weights(name: str, weights: WeightsSpec, access: HubAccess) -> Place:
    """Where the files of weights of the catalog are.

    Args:
        name: `architecture.tag`.
        weights: Their record.
        access: How to reach the Hub.

    Raises:
        WeightsError: When they are neither installed nor published.
    """
    packaged = Folder(PACKAGED / name)
    if all(packaged.find(file.name) for file in weights.encoder):
        return packaged
    if weights.repo is None:
        raise WeightsError(f"{name} is not in {PACKAGED} and was never published; install medmim from its source")
    if (hub := _local_hub()) is not None:
        return _in_local_hub(hub, weights.repo)
    namespace = os.environ.get("MEDMIM_HUB")
    if namespace:
        # The copy has other commits; the digests see to it that it has the same files.
        return Repository(f"{namespace}/{weights.repo.partition('/')[2]}", access=access)
    return Repository(weights.repo, weights.revision or "main", access)


def place_of_repository(repo: str, revision: str | None, access: HubAccess) -> Place:
    """Where the files of a repository that the caller named are: the Hub, or the folder that replaces it.

    Raises:
        WeightsError: For a name that is not "org/name", or a local hub that lacks it or is asked for a revision.
    """
    if not REPOSITORY.fullmatch(repo):
        raise WeightsError(f"{repo!r} is not the name of a repository; it is written org/name, or org/name@revision")
    if (hub := _local_hub()) is None:
        return Repository(repo, revision or "main", access)
    if revision is not None:
        raise WeightsError(f"MEDMIM_HUB={hub} holds one version of each model; leave out the revision {revision!r}")
    return _in_local_hub(hub, repo)


def _local_hub() -> Path | None:
    value = os.environ.get("MEDMIM_HUB", "")
    is_path = value.startswith((".", "~")) or "/" in value or "\\" in value
    return Path(value).expanduser() if is_path else None


def _in_local_hub(hub: Path, repo: str) -> Folder:
    folder = Folder(hub / repo)
    if not folder.path.is_dir():
        raise WeightsError(f"MEDMIM_HUB={hub} has no folder {repo}; copy the model there, or unset MEDMIM_HUB")
    return folder


# --- model folders ----------------------------------------------------------------------------------------------------


def read_model(place: Place) -> tuple[ModelSpec, Place]:
    """What a model folder says it is.

    Returns:
        The spec, and the place pinned to the commit that the spec was read from.

    Raises:
        WeightsError: When there is no readable `config.json`.
        SpecError: When it says something impossible.
    """
    if isinstance(place, Folder) and not place.path.is_dir():
        raise WeightsError(f"{place}: there is no such folder")
    path = place.find(CONFIG)
    if path is None:
        raise WeightsError(f"{place}: not a model folder, it has no {CONFIG} (medmim.save_pretrained writes one)")
    spec = ModelSpec.parse(_read_json(path), source=str(path))
    if isinstance(place, Repository):
        commit = path.parent.name
        place = replace(place, revision=commit if COMMIT.fullmatch(commit) else place.revision)
        if spec.weights is not None:
            published = {"repo": place.repo, "revision": commit if COMMIT.fullmatch(commit) else None}
            spec = spec.model_copy(update={"weights": spec.weights.model_copy(update=published)})
    return spec, place


def fetch_encoder(place: Place, weights: WeightsSpec | None) -> Iterable[Path]:
    """The files that hold the encoder; without a record of weights those of the usual names, which nothing can check.

    Returns:
        The files in order. Those of a folder on this disk are hashed side by side, while who goes through them is
        busy with the first ones: each is given when its bytes have been checked.

    Raises:
        WeightsError: When a file is missing, damaged or cannot be fetched; for a folder when that file's turn comes.
    """
    if weights is not None and isinstance(place, Folder):
        pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="medmim-check")
        files = pool.map(place.fetch, weights.encoder)
        pool.shutdown(wait=False)  # it finishes what it was given
        return files
    if weights is not None:
        return [place.fetch(file) for file in weights.encoder]
    if (whole := place.find(ENCODER)) is not None:
        return [whole]
    index = place.find(f"{ENCODER}.index.json")
    if index is None:
        raise WeightsError(f"{place}: has neither {ENCODER} nor {ENCODER}.index.json; save the model again")
    shards = [place.find(name) for name in _shards(index)]
    if None in shards:
        raise WeightsError(f"{index}: not all of its shards are there; fetch or save the model again")
    return shards


def write_config(folder: Path, spec: ModelSpec) -> None:
    """Writes `config.json`.

    Raises:
        SpecError: When an argument of the model is no plain data.
    """
    try:
        text = json.dumps(spec.to_data(), indent=2) + "\n"
    except ValueError as error:
        raise SpecError(f"{spec.name}: only plain data can be saved as constructor arguments ({error})") from None
    with atomic_write(folder / CONFIG) as temporary:
        temporary.write_text(text, encoding="utf-8")


def describe_file(folder: Path, name: str) -> FileSpec:
    """The record of a file of a model folder: its name, sha256 and size."""
    path = folder / name
    return FileSpec(name=name, sha256=sha256_of(path), size=path.stat().st_size)


def _shards(index: Path) -> list[str]:
    data = _read_json(index)
    files = data.get("weight_map") if isinstance(data, Mapping) else None
    if not isinstance(files, Mapping) or not files or not all(isinstance(name, str) for name in files.values()):
        raise WeightsError(f"{index}: weight_map must map tensors to files")
    names = sorted(set(files.values()))
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise WeightsError(f"{index}: {name!r} must be a safetensors file beside the index")
    return names


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > JSON_BYTES:
            raise WeightsError(f"{path}: larger than {JSON_BYTES} bytes, which no file of its kind is")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({error})") from None


# --- bytes ------------------------------------------------------------------------------------------------------------


def _fault(path: Path, file: FileSpec) -> str | None:
    """How a file differs from its record, in words."""
    size = path.stat().st_size
    if size != file.size:
        return f"it has {size} bytes, expected {file.size}"
    found = sha256_of(path)
    return None if found == file.sha256 else f"its sha256 is {found}, expected {file.sha256}"


def _state_of(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"
