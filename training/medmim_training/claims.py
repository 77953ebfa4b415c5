"""What the run in a folder is bound to: its recipe, and for pretraining its store. Another one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medmim.errors import SpecError
from medmim.files import write_text
from medmim.limits import CONFIG_BYTES, read_json
from medmim.spec import Record
from medmim_training.recipe import RunRecipe, load_recipe
from medmim_training.store.index import Store


class _StoreClaim(Record):
    """Which store a run draws from: enough to know it again, wherever it lies."""

    store: str
    volumes: int
    sha256: str


def claim(path: Path, recipe: RunRecipe, *, kind: type[RunRecipe]) -> None:
    """Writes the recipe of a run that begins, or checks that the run that is there is this recipe's.

    What only says how a run is carried out (`RunRecipe.free`) may change from one session to the next.

    Args:
        path: The recipe in the run's folder, which is made.
        recipe: Of the run.
        kind: Of recipes that may be there.

    Raises:
        SpecError: When another recipe ran there; it says in what the two differ.
    """
    if path.is_file():
        # Read, not compared as text: a run from before a key existed has that key's default.
        there, here = (_flat(each.model_dump(mode="json")) for each in (load_recipe(str(path), kind=kind), recipe))
        changed = [key for key in {**there, **here} if there.get(key) != here.get(key) and not _is_free(key, recipe)]
        if changed:
            differences = "; ".join(f"{key} was {there.get(key)} and is now {here.get(key)}" for key in changed)
            raise SpecError(
                f"{path}: another recipe ran here ({differences}); choose another folder, or that recipe to go on "
                "with its run"
            )
    write_text(path, recipe.to_yaml())


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"workers": 1}} as {"data.workers": 1}."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _is_free(key: str, recipe: RunRecipe) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in recipe.free)


def check_store(path: Path, store: Store) -> None:
    """Refuses another store than the one that a run drew from.

    Args:
        path: What `claim_store` wrote; a run of an older medmim has none, and is believed.
        store: The one at hand.

    Raises:
        SpecError: When it is another.
    """
    if not path.is_file():
        return
    before = _StoreClaim.parse(read_json(path, CONFIG_BYTES), source=str(path))
    if before.sha256 != store.digest():
        raise SpecError(
            f"{path}: the run drew from {before.store}, of {before.volumes} volumes; {store.folder}, of "
            f"{len(store.entries)}, holds other scans or was prepared otherwise; use that store, or another folder"
        )


def claim_store(path: Path, store: Store) -> None:
    """Notes which store a run draws from; a run that is there must draw from the same.

    Raises:
        SpecError: When it drew from another.
    """
    check_store(path, store)
    claimed = _StoreClaim(store=str(store.folder), volumes=len(store.entries), sha256=store.digest())
    write_text(path, json.dumps(claimed.to_data(), indent=1) + "\n")
