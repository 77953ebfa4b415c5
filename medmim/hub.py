"""Where the files of a model come from, and the check that they are the right ones.

A model folder holds `config.json` (a ModelSpec), safetensors files and what goes with them. It is a folder on this
disk or a repository of the Hugging Face Hub; for weights of the catalog the order is `medmim/weights/NAME/`, which
ships with the source, then the Hub's cache, then the Hub. `MEDMIM_HUB` replaces the Hub's namespace by another one
("hospital"), or the Hub by a local folder ("/data/hub", "./hub"), see `medmim.localhub`.

Every file with a known sha256 is hashed, once for as long as it stays as it was then (`medmim.verified`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from medmim.access import HubAccess
from medmim.errors import SpecError, WeightsError
from medmim.files import sha256_of, write_text
from medmim.limits import CONFIG_BYTES, read_json
from medmim.localhub import REPOSITORY, LocalHub, Version
from medmim.registry import PACKAGED
from medmim.remote import Repository
from medmim.spec import INSIDE, FileSpec, ModelSpec, WeightsSpec
from medmim.transport import COMMIT
from medmim.verified import fault_unless_noted, note_of

CONFIG, ENCODER, GOLDEN = "config.json", "model.safetensors", "golden.safetensors"
NAMESPACE = "medmim"  # on the Hub, of weights of the catalog that name no repository
# Files of a model folder that a loader does not need.
OF_TRAINING = ("data.csv", "recipe.yaml", "reconstruction.png")
COMPANIONS = ("README.md", "LICENSE", *OF_TRAINING)
TENSORS = (ENCODER, f"{ENCODER}.index.json", "model-[0-9]*-of-[0-9]*.safetensors", "decoder.safetensors")
# Wildcards for what goes with one set of weights; beside others it would be taken for theirs.
OF_WEIGHTS = (*TENSORS, GOLDEN, *OF_TRAINING)
OF_MODEL = (*TENSORS, GOLDEN, *COMPANIONS)


# --- places -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """A model folder on this disk."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def for_keeping(self) -> Folder:
        """The same place, wherever the process goes on."""
        return replace(self, path=self.path.absolute())

    def find(self, name: str) -> Path | None:
        """The path of a file, None when there is none.

        Raises:
            WeightsError: When it is a link that leads out of the folder, which may have been copied from a stranger.
        """
        path = self.path / name
        if not path.is_file():
            return None
        if not path.resolve().is_relative_to(self._bounds()):
            raise WeightsError(f"{path}: a link that leads out of the model folder; copy the file itself there")
        return path

    def _bounds(self) -> Path:
        """Where the files of the folder may lie: inside it, or for a snapshot of the Hub's cache, inside the cache."""
        path = self.path.resolve()
        # CACHE/models--ORG--NAME/snapshots/COMMIT has links to the blobs of its repository, which may link on.
        if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
            return path.parents[2]
        return path

    def fetch(self, file: FileSpec) -> Path:
        """The path of a file whose bytes have been checked.

        Raises:
            WeightsError: When it is missing or is another file than `file` describes.
        """
        path = self.find(file.name)
        if path is None:
            raise WeightsError(f"{self.path}: {file.name} is missing; copy or save the model again")
        fault = fault_unless_noted(path, note_of(path, file.sha256), sha256=file.sha256, size=file.size)
        if fault:
            raise WeightsError(f"{path}: damaged ({fault}); copy or save the model again")
        return path


class Installed(Folder):
    """A model folder that ships with medmim; some installers make each file of a package a link."""

    def _bounds(self) -> Path:
        return Path(self.path.resolve().anchor)


@dataclass(frozen=True)
class LocalVersion(Folder):
    """A model folder in a local hub, none of whose files may lie outside of it.

    Attributes:
        hub: The hub's folder.
        repo: "org/name".
        revision: The version, 40 hexadecimal digits; None for a folder that was copied there by hand.
    """

    hub: Path
    repo: str
    revision: str | None

    def for_keeping(self) -> LocalVersion:
        """See `Folder`."""
        return replace(super().for_keeping(), hub=self.hub.absolute())

    def _bounds(self) -> Path:
        return self.hub.resolve()


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
    packaged = Installed(PACKAGED / name)
    if all(packaged.find(file.name) for file in weights.encoder):
        return packaged
    if (hub := local_hub()) is not None:
        return in_local_hub(hub, hub.find_pinned(repository_of(name, weights), weights.revision))
    if weights.repo is None:
        raise WeightsError(f"{name} is not in {PACKAGED} and was never published; install medmim from its source")
    namespace = os.environ.get("MEDMIM_HUB")
    if namespace:
        # The copy has other commits; the digests see to it that it has the same files.
        return Repository(f"{namespace}/{weights.repo.partition('/')[2]}", access=access)
    return Repository(weights.repo, weights.revision or "main", access)


def place_of_repository(repo: str, revision: str | None, access: HubAccess) -> Place:
    """Where the files of a repository that the caller named are: the Hub, or the folder that replaces it.

    Raises:
        WeightsError: For a name that is not "org/name", or one that a local hub lacks.
    """
    if not REPOSITORY.fullmatch(repo):
        raise WeightsError(f"{repo!r} is not the name of a repository; it is written org/name, or org/name@revision")
    if (hub := local_hub()) is None:
        return Repository(repo, revision or "main", access)
    return in_local_hub(hub, hub.find(repo, revision))


def repository_of(name: str, weights: WeightsSpec) -> str:
    """Where weights of the catalog are published, or would be."""
    return weights.repo or f"{NAMESPACE}/{name}"


def local_hub() -> LocalHub | None:
    """The folder that replaces the Hub, when `MEDMIM_HUB` names one."""
    value = os.environ.get("MEDMIM_HUB", "")
    is_path = value.startswith((".", "~")) or "/" in value or "\\" in value
    return LocalHub(value) if is_path else None


def in_local_hub(hub: LocalHub, version: Version) -> LocalVersion:
    """The model folder that a version is, whose files may not lie outside of the hub."""
    return LocalVersion(version.folder, hub.root, version.repo, version.name)


# --- model folders ----------------------------------------------------------------------------------------------------


def read_model(place: Place) -> tuple[ModelSpec, Place]:
    """What a model folder says it is.

    Returns:
        The spec, and the place pinned to the commit that the spec was read from.

    Raises:
        WeightsError: When there is no readable `config.json`.
        SpecError: When it says something impossible.
    """
    if isinstance(place, Folder) and not os.path.isdir(place.path):  # false for what cannot be a path, too
        raise WeightsError(f"{place}: there is no such folder")
    path = place.find(CONFIG)
    if path is None:
        raise WeightsError(f"{place}: not a model folder, it has no {CONFIG} (medmim.save_pretrained writes one)")
    spec = ModelSpec.parse(read_json(path, CONFIG_BYTES, error=WeightsError), source=str(path))
    if isinstance(place, Repository) and COMMIT.fullmatch(path.parent.name):
        place = replace(place, revision=path.parent.name)
    if isinstance(place, Repository | LocalVersion):
        spec = as_published(spec, place.repo, place.revision)
    return spec, place


def as_published(spec: ModelSpec, repo: str, revision: str | None) -> ModelSpec:
    """The spec with the repository and, if it is one, the commit that its weights are in."""
    if spec.weights is None:
        return spec
    commit = revision if revision and COMMIT.fullmatch(revision) else None
    weights = spec.weights.model_copy(update={"repo": repo, "revision": commit})
    return spec.model_copy(update={"weights": weights})


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


def fetch_all(place: Place, spec: ModelSpec) -> dict[str, Path]:
    """Every file of a model that medmim knows of, by its name in the model folder; those with a digest are checked.

    Raises:
        WeightsError: When a file that the model needs is missing, damaged or cannot be fetched.
    """
    if spec.weights is not None:
        files = {file.name: place.fetch(file) for file in spec.weights.files}
    else:
        files = {path.name: path for path in fetch_encoder(place, None)}
    others = ((name, place.find(name)) for name in (CONFIG, f"{ENCODER}.index.json", *COMPANIONS))
    return files | {name: path for name, path in others if path is not None}


def write_config(folder: Path, spec: ModelSpec) -> None:
    """Writes `config.json`.

    Raises:
        SpecError: When an argument of the model is no plain data.
    """
    try:
        text = json.dumps(spec.to_data(), indent=2) + "\n"
    except ValueError as error:
        raise SpecError(f"{spec.name}: only plain data can be saved as constructor arguments ({error})") from None
    write_text(folder / CONFIG, text)


def describe_file(folder: Path, name: str) -> FileSpec:
    """The record of a file of a model folder: its name, sha256 and size."""
    path = folder / name
    return FileSpec(name=name, sha256=sha256_of(path), size=path.stat().st_size)


def _shards(index: Path) -> list[str]:
    data = read_json(index, CONFIG_BYTES, error=WeightsError)
    files = data.get("weight_map") if isinstance(data, Mapping) else None
    if not isinstance(files, Mapping) or not files or not all(isinstance(name, str) for name in files.values()):
        raise WeightsError(f"{index}: weight_map must map tensors to files")
    names = sorted(set(files.values()))
    for name in names:
        if not INSIDE.fullmatch(name) or "/" in name or not name.endswith(".safetensors"):
            raise WeightsError(f"{index}: {name!r} must be a safetensors file beside the index")
    return names
