"""File formats of scans: how files of each are known, and what their readers have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from medmim.errors import ScanError
from medmim.limits import VOXELS

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
SCAN_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES)
DICOM_SUFFIX = ".dcm"

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def without_suffix(name: str) -> str:
    """The name of a scan without what tells its format; that of a folder stays whole, whatever dots are in it."""
    known = (suffix for suffix in (*SCAN_SUFFIXES, DICOM_SUFFIX, "") if name.lower().endswith(suffix))
    return name[: len(name) - len(max(known, key=len))] or name


def check_frames(shape: tuple[int, ...], path: Path) -> None:
    """Refuses what is more than one 3-D scan, before its voxels are read."""
    if len(shape) > 4 and max(shape[4:]) > 1:
        raise ScanError(f"{path}: holds vectors (shape {times(shape)}), not one value a voxel; save one component")
    if len(shape) > 3 and shape[3] > 1:
        raise ScanError(
            f"{path}: a series of {shape[3]} frames (shape {times(shape)}); split it and give one 3-D frame at a time"
        )


def check_claim(shape: tuple[int, ...], room: int, path: Path, format_name: str) -> None:
    """Refuses voxels that a header claims and its file cannot hold, before memory is taken for them.

    Args:
        shape: As the header says.
        room: Voxels that a file of this size can hold at the most.
        path: The file, for the error.
        format_name: Likewise.
    """
    if min(shape) < 0:
        raise ScanError(f"{path}: its header claims sides of {times(shape)} voxels; copy or export it again")
    voxels = math.prod(map(int, shape))
    if voxels > VOXELS:
        raise ScanError(f"{path}: its header claims {voxels} voxels, and at most {VOXELS} are read; cut the scan")
    if voxels > room:
        raise ScanError(
            f"{path}: cannot be read as {format_name} (its header claims {voxels} voxels, a file of this size holds at "
            f"most {room}); copy or export it again"
        )


def times(numbers: Iterable[float]) -> str:
    """Sizes in words: "2 x 3 x 4"."""
    return " x ".join(f"{number:g}" for number in numbers)


def one_line(error: Exception) -> str:
    """What matters of a library's message: nibabel's first line; of ITK's, the last that gives an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if not isinstance(error, RuntimeError):
        return lines[0]
    # Behind a matrix that ITK refuses stand its rows.
    told = (line for line in reversed(lines) if not re.match(r"Reason:|(to )?[-\d. ]+$", line))
    line = next(told, lines[-1])
    return re.sub(r"^(sitk::|ITK )ERROR: (\w+\(0x\w+\): )?", "", line)
