"""Many scans: which ones are meant, what each is called, and a table with a row for each."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from medmim.errors import ScanError, SpecError
from medmim.files import write_csv
from medmim.volumes import SCAN_SUFFIXES, find_scans


def name_scans(paths: Iterable[Path], *, outside: Path | None = None) -> dict[str, Path]:
    """The scans that are meant, by a name without a suffix that no two share.

    Args:
        paths: Scans, which are called by their file name, and folders of scans at any depth, which are called by their
            path below the folder. A folder without scans is taken for that of one DICOM series.
        outside: A folder whose content is left out, such as that of results; it may lie in a folder of scans.

    Raises:
        ScanError: When two scans would have the same name.
        SpecError: When all of a folder of scans would be left out.
    """
    named: dict[str, Path] = {}
    for path in paths:
        found = find_scans(path) if path.is_dir() else []
        if outside is not None and path.is_dir():
            if _is_in(path, outside):
                raise SpecError(f"{outside}: is or holds the folder of scans {path}; choose an output of its own")
            found = [scan for scan in found if not _is_in(scan, outside)]
        for scan in found or [path]:
            inner = scan != path
            name = _without_suffix(scan.relative_to(path).as_posix() if inner else scan.absolute().name)
            if named.get(name) == scan:
                raise ScanError(f"{scan}: given twice; leave one out")
            if name in named:
                raise ScanError(f"{named[name]} and {scan}: both would be called {name}; take them in separate runs")
            named[name] = scan
    return named


def place_masks(named: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Where the mask of each scan goes, by the scan's name.

    Args:
        named: Scans, see `name_scans`.
        folder: For all masks.

    Raises:
        SpecError: When that is the place of a scan, which would be taken for a mask that is finished.
    """
    masks = {name: folder / f"{name}.nii.gz" for name in named}
    scans = {scan.resolve() for scan in named.values()}
    for mask in masks.values():
        if mask.resolve() in scans:
            raise SpecError(f"{mask}: is a scan, and a mask would go there; choose another output than {folder}")
    return masks


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, by whatever links either is named."""
    # The last part stays as it is: a link to a scan lies where the link is.
    where = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    return where.is_relative_to(folder.resolve())


def _without_suffix(name: str) -> str:
    suffix = max((suffix for suffix in (*SCAN_SUFFIXES, "") if name.lower().endswith(suffix)), key=len)
    return name[: len(name) - len(suffix)]


class ScanTable:
    """A CSV file with a row a scan and a column a class; it is on disk in full after each row.

    Args:
        path: The file; rows that it has already stay.
        columns: Of numbers, besides the first, which is `scan`.

    Raises:
        SpecError: When the file has other columns, or is no CSV file.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.header = path, ["scan", *columns]
        self.rows: dict[str, list[str]] = {}
        if path.is_file():
            header, *rows = _read_csv(path) or [[]]
            if header != self.header:
                raise SpecError(
                    f"{path}: has the columns {', '.join(header)}, as of another model; choose another output"
                )
            self.rows = {row[0]: row[1:] for row in rows if row}

    def __contains__(self, scan: str) -> bool:
        return scan in self.rows

    def add(self, scan: str, values: Iterable[float]) -> None:
        """Adds the row of a scan, or replaces it."""
        self.rows[scan] = [f"{value:.6g}" for value in values]
        write_csv(self.path, self.header, ([name, *row] for name, row in self.rows.items()))


def _read_csv(path: Path) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error):
        raise SpecError(f"{path}: not readable as CSV in UTF-8; choose another output, or delete it") from None
