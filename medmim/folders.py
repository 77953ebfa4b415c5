"""Scans below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from medmim.formats import DICOM_SUFFIX, SCAN_SUFFIXES

LOOKS = 5  # files of other names in a folder that are opened to see whether they are slices


def find_scans(folder: str | Path) -> list[Path]:
    """Scans at any depth below a folder, sorted: files by their suffix, and folders of DICOM slices.

    Slices end in `.dcm`, or are known by what a file starts with. Names that start with a dot are passed over: macOS
    puts such a file beside each scan on a disk of another system. Links to folders are followed, into each folder once.
    """
    found: list[Path] = []
    unlisted: list[OSError] = []
    for parent, names in _walk(Path(folder), unlisted):
        files = [parent / name for name in sorted(names) if not name.startswith(".")]
        found += [path for path in files if path.name.lower().endswith(SCAN_SUFFIXES) and _is_file_or_lost(path)]
        if _holds_slices([path for path in files if not path.name.lower().endswith(SCAN_SUFFIXES)]):
            found.append(parent)
    # What reads a folder that may not be listed says so.
    return sorted(found + [Path(error.filename) for error in unlisted if isinstance(error, PermissionError)])


def _walk(folder: Path, unlisted: list[OSError]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder at or below another, and the names in it; linked ones last, so that all have their own path first."""
    todo, seen = [folder], set()
    while todo:
        for parent, folders, names in os.walk(todo.pop(0), onerror=unlisted.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            place = os.path.realpath(parent)
            if place in seen:  # by a link, which may lead up
                folders.clear()
                continue
            seen.add(place)
            todo += [path for name in folders if (path := Path(parent, name)).is_symlink()]
            yield Path(parent), names


def _holds_slices(files: list[Path]) -> bool:
    """Whether DICOM slices are among the files of a folder, which have no suffix of another scan."""
    if any(path.name.lower().endswith(DICOM_SUFFIX) and _is_file_or_lost(path) for path in files):
        return True
    # An index, which starts as slices do, may stand in a folder that has none.
    files = [path for path in files if path.name.upper() != "DICOMDIR"]
    looks = min(LOOKS, len(files))
    # From all over the list, so that notes beside the slices do not decide.
    return any(_starts_as_dicom(files[i * len(files) // looks]) for i in range(looks))


def _is_file_or_lost(path: Path) -> bool:
    """Whether a name stands for a file, or for a link to one that is not there: what reads that says so."""
    return path.is_file() or not path.exists()


def _starts_as_dicom(path: Path) -> bool:
    from pydicom.misc import is_dicom

    try:
        return path.is_file() and is_dicom(path)  # to open a pipe would wait for its other end
    except OSError:
        return False
