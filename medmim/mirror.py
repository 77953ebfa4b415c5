"""Chosen models, copied with their digests into a local hub: for a site that has no way to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from medmim import hub
from medmim.errors import WeightsError
from medmim.localhub import MAIN, REVISION, LocalHub, Version
from medmim.resolution import resolve


def mirror(
    name: str,
    folder: str | Path,
    *,
    access: hub.HubAccess | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Version:
    """Copies a model with all that was published beside it; every file that has a digest is checked on the way.

    There it has the commit that it has on the Hub, so that whatever names it here finds it there. A revision that was
    named, and the one that a catalog pins, may be old: where the local hub has a main already, it stays where it is.

    Args:
        name: "architecture[.tag]" of the catalog or "hf-hub:org/name[@revision]".
        folder: The local hub; made when there is none.
        access: How to reach the Hub.
        progress: Called with bytes copied and bytes in all.

    Raises:
        UnknownModelError: For a name that does not exist.
        WeightsError: When files are missing, damaged, or cannot be fetched or written.
    """
    kind, _, rest = name.partition(":")
    if kind == "local-dir":
        raise WeightsError(
            f"{name} belongs to no repository; `medmim push {rest} ORG/NAME --hub {folder}` gives it one"
        )
    spec, place = resolve(name, None, access or hub.HubAccess(), needs_weights=True)
    named = None
    if kind == "hf-hub":
        repo, commit = place.repo, place.revision
        named = rest.partition("@")[2] or MAIN
    else:
        repo, commit = hub.repository_of(spec.name, spec.weights), spec.weights.revision
    version = commit if commit and hub.COMMIT.fullmatch(commit) else None
    local = LocalHub(folder)
    is_newest = version is None or named == MAIN
    branches = [MAIN] if is_newest or local.head(repo) is None else []
    if named not in (None, MAIN, commit) and REVISION.fullmatch(named):
        branches.append(named)
    version = local.publish(repo, hub.fetch_all(place, spec), version=version, branches=branches, progress=progress)
    return local.find(repo, version)
