"""Checkpoints of a run: written atomically, the newest few and the best kept, read without unpickling code."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from medmim.errors import MedmimError, WeightsError
from medmim.files import atomic_write

NAME, BEST = re.compile(r"^step-(\d{8})\.pt$"), "best.pt"
PARTS = {"step", "best", "spent", "method", "optimizer"}  # of the state of a run


class CheckpointError(MedmimError):
    """A checkpoint could not be written; the one before it is untouched."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int, best: bool) -> None:
    """Writes the checkpoint of `step`, then drops all but the newest ones.

    Args:
        folder: Of the run's checkpoints.
        step: Steps done.
        state: Tensors and plain data; `PARTS` and more.
        keep: How many of the newest stay.
        best: Whether this is the best so far, to be kept as `best.pt` whatever comes later.

    Raises:
        CheckpointError: When the disk is full or the folder cannot be written to.
    """
    path = folder / f"step-{step:08d}.pt"
    try:
        with atomic_write(path) as temporary:
            torch.save(state, temporary)
            if best:  # before there is a checkpoint that says so, or a run killed in between would never have it
                _link(temporary, folder / BEST)
    # torch's archive writer turns a failed write into a RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: could not be written ({reason}); make room and start the same command again, "
            "it goes on from the checkpoint before"
        ) from error
    for old in _checkpoints(folder)[:-keep]:
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
        # torch writes archives that are not compressed; one that is may unpack to more than any memory holds.
        with zipfile.ZipFile(found[-1]) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("it is compressed")
        state = torch.load(found[-1], map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= PARTS:
            raise ValueError(f"it lacks {', '.join(sorted(PARTS))}")
    except Exception as error:
        # torch raises whatever the damaged archive makes it trip over; there is no common base class.
        fault = str(error) if type(error) is ValueError else type(error).__name__
        raise WeightsError(f"{found[-1]}: damaged ({fault}); delete it to go on from the one before") from error
    return state


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if NAME.match(path.name))


def _link(path: Path, target: Path) -> None:
    """Gives the same bytes a second name, so that the best checkpoint costs no room while it is also a new one."""
    with atomic_write(target) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:  # exFAT, and many disks over a network, have one name a file
            shutil.copyfile(path, temporary)
