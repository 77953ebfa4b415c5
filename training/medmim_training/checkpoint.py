"""Checkpoints of a run: written atomically, the last few kept, read without unpickling code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from medmim.errors import WeightsError
from medmim.files import atomic_write

KEEP = 2
NAME = re.compile(r"^step-(\d{8})\.pt$")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes the checkpoint of `step` and then drops all but the newest `KEEP`."""
    with atomic_write(folder / f"step-{step:08d}.pt") as path:
        torch.save(state, path)
    for old in _checkpoints(folder)[:-KEEP]:
        old.unlink()


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint in `folder`, or None when there is none.

    Raises:
        WeightsError: When it cannot be read.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    try:
        return torch.load(found[-1], map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises whatever the damaged archive makes it trip over; there is no common base class.
        raise WeightsError(
            f"{found[-1]}: damaged ({type(error).__name__}); delete it to go on from the one before"
        ) from error


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if NAME.match(path.name))
