"""The cards of the catalog, checked in beside the source: written from the records, and found where they are stale."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from medmim import hub, registry
from medmim.cards import render_card
from medmim.cards.encoder import PICTURE_FILE
from medmim.errors import SpecError
from medmim.files import write_text
from medmim.spec import ModelSpec


def write_cards(folder: Path) -> list[Path]:
    """Writes the card of each set of weights of the catalog, where it is missing or stale.

    Args:
        folder: Where cards are, as `NAME.md`.

    Returns:
        The files that were written.

    Raises:
        SpecError: When there is no such folder, or a set of weights has no training record.
    """
    stale = {path: text for path, text in _catalog_cards(folder) if _read(path) != text}
    for path, text in stale.items():
        write_text(path, text)
    return list(stale)


def check_cards(folder: Path) -> list[str]:
    """What is wrong with the cards of a folder, a line each; nothing when all are as `write_cards` would write them.

    Raises:
        SpecError: When there is no such folder, or a set of weights has no training record.
    """
    cards = dict(_catalog_cards(folder))
    problems = []
    for path in sorted({*cards, *folder.glob("*.md")}):
        if path not in cards:
            problems.append(f"{path}: no weights of the catalog are called so; delete it")
        elif not path.is_file():
            problems.append(f"{path}: missing; `medmim cards` writes it")
        elif _read(path) != cards[path]:
            problems.append(f"{path}: stale; `medmim cards` writes it anew")
    return problems


def _catalog_cards(folder: Path) -> Iterator[tuple[Path, str]]:
    """Where each card belongs, and what it says."""
    if not folder.is_dir():
        raise SpecError(f"{folder}: there is no such folder; cards are in model_cards of a checkout")
    for name in registry.list_pretrained():
        info = registry.model_info(name)
        spec = ModelSpec(architecture=info.name, family=info.family, args=info.args, weights=info.weights[0])
        picture = hub.PACKAGED / name / PICTURE_FILE
        shown = Path(os.path.relpath(picture, folder)).as_posix() if picture.is_file() else None
        yield folder / f"{name}.md", render_card(spec, picture=shown)


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
