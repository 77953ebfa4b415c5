"""What a name of `create_model` means: a model of the catalog, of a folder or of a repository."""

from __future__ import annotations

import os
from pathlib import Path

from medmim import hub, registry
from medmim.errors import UnknownModelError, WeightsError
from medmim.spec import ModelSpec


def resolve(
    name: str, revision: str | None, access: hub.HubAccess, *, needs_weights: bool
) -> tuple[ModelSpec, hub.Place | None]:
    """The model that a name of `create_model` means, and where its weights are.

    Args:
        name: See `create_model`, as its errors.
        revision: See `create_model`.
        access: How to reach the Hub.
        needs_weights: Whether a name of the catalog without weights is an error; otherwise its place is None.

    Returns:
        Its spec, and the place of its weights.
    """
    if not isinstance(name, str):
        raise UnknownModelError(
            f"a name of a model is text, not of type {type(name).__name__}; from_pretrained(PATH) loads a folder, as "
            "does the name 'local-dir:PATH'"
        )
    kind, separator, rest = name.partition(":")
    if separator and kind == "local-dir":
        if not rest.strip():  # would be the folder that one happens to be in
            raise UnknownModelError(f"{name!r} names no folder; write local-dir:PATH, with . for the one you are in")
        return hub.read_model(hub.Folder(Path(os.path.expanduser(rest))))
    if separator and kind == "hf-hub":
        repo, at, named = rest.partition("@")
        if at and revision is not None and revision != named:
            raise WeightsError(f"{name!r} names a revision and revision={revision!r} another; give one of them")
        return hub.read_model(hub.place_of_repository(repo, named or revision, access))
    if separator:
        raise UnknownModelError(f"{name!r}: there is no source {kind!r}; write hf-hub:org/name or local-dir:path")
    if "/" in name or "\\" in name:
        raise UnknownModelError(
            f"{name!r} has two readings; write 'hf-hub:{name}' for a Hub repository or 'local-dir:{name}' for a folder"
        )
    if revision is not None:
        raise WeightsError(f"revision= is for hf-hub: names; weights of the catalog such as {name} are pinned there")

    info = registry.model_info(name)
    spec = ModelSpec(architecture=info.name, family=info.family, args=info.args)
    if not needs_weights:
        return spec, None
    if not info.weights:
        known = registry.list_pretrained()
        raise WeightsError(
            f"{name} has no weights yet; "
            + (f"weights exist for: {', '.join(known)}; " if known else "no weights are in the catalog; ")
            + "train and publish your own with `medmim-train package`, or point to a folder or a repository: "
            'create_model("local-dir:PATH", pretrained=True), create_model("hf-hub:ORG/NAME", pretrained=True)'
        )
    spec = spec.model_copy(update={"weights": info.weights[0]})
    return spec, hub.place_of_weights(spec.name, info.weights[0], access)
