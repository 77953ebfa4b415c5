"""Whether weights are still what was published: every byte, and what the model computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from medmim import hub
from medmim.checkpoints import read_tensors
from medmim.errors import MedmimError, WeightsError
from medmim.factory import create_decoder, create_model
from medmim.files import sha256_of
from medmim.golden import difference, golden_outputs
from medmim.localhub import SUMS, LocalHub, read_sums
from medmim.registry import list_pretrained
from medmim.resolution import resolve

GOLDEN = "golden outputs"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        item: Name of a file, or `GOLDEN`.
        fault: What is wrong with it, in words; None when it is as published.
    """

    item: str
    fault: str | None


def verify(name: str, *, access: hub.HubAccess | None = None) -> Iterator[Check]:
    """Hashes every file of a model that has a digest, whatever is remembered of earlier checks; then runs the model.

    Args:
        name: As `create_model` takes it. What is not on this disk yet is fetched.
        access: How to reach the Hub.

    Yields:
        A check of each file, then of the golden outputs where there are some and all files are right.

    Raises:
        UnknownModelError: For a name that does not exist.
        SpecError: For a bad `config.json`.
        WeightsError: When the files cannot be fetched, or have no digests to compare with.
    """
    access = access or hub.HubAccess()
    spec, place = resolve(name, None, access, needs_weights=True)
    recorded = [(file.name, file.sha256) for file in spec.weights.files] if spec.weights else []
    listed = read_sums(place.path) if isinstance(place, hub.Folder) and (place.path / SUMS).exists() else {}
    if not recorded and not listed:
        raise WeightsError(f"{name} was saved without digests, so nothing can be verified; publish it to have some")
    expected: dict[str, set[str]] = {}
    for file, digest in (*recorded, *listed.items()):
        expected.setdefault(file, set()).add(digest)
    sound = True
    for file, digests in expected.items():
        check = Check(file, _fault(place.find(file), digests))
        sound = sound and check.fault is None
        yield check
    if sound and spec.weights and spec.weights.golden:
        yield Check(GOLDEN, _golden_fault(name, access))


def installed() -> list[str]:
    """Names, for `verify`, of the weights that ship and of everything in the local hub, where one is set."""
    shipped = [name for name in list_pretrained() if (hub.PACKAGED / name / hub.CONFIG).is_file()]
    local = hub.local_hub()
    return shipped + (models_in(local.root) if local else [])


def models_in(folder: str | Path) -> list[str]:
    """Names, for `verify`, of what is in a folder: itself if it is a model folder, else every version of a local hub.

    Raises:
        WeightsError: When it is neither.
    """
    folder = Path(folder)
    if (folder / hub.CONFIG).is_file():
        return [f"local-dir:{folder}"]
    versions = [f"local-dir:{version.folder}" for version in LocalHub(folder).versions()]
    if not versions:
        raise WeightsError(f"{folder}: neither a model folder nor a local hub with models; check the path")
    return versions


def _fault(path: Path | None, digests: set[str]) -> str | None:
    if path is None:
        return "is missing"
    try:
        found = sha256_of(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    expected = " and ".join(sorted(digests))
    return None if found == expected else f"its sha256 is {found}, expected {expected}, at {path}"


def _golden_fault(name: str, access: hub.HubAccess) -> str | None:
    try:
        model = create_model(name, pretrained=True, **asdict(access))
        weights = model.spec.weights
        decoder = create_decoder(model) if weights.decoder else None
        return difference(golden_outputs(model, decoder), read_tensors([model.weights_place.fetch(weights.golden)]))
    except MedmimError as error:
        return str(error)
