"""Many scans at a time: how each is called in the output, and a table with a row for each that is done."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from medmim.errors import ScanError, SpecError, printable
from medmim.files import check_writable, write_csv
from medmim.folders import find_scans
from medmim.formats import without_suffix
from medmim.limits import read_csv

# --- names ------------------------------------------------------------------------------------------------------------


def name_scans(paths: Iterable[Path], *, outside: Path | None = None) -> dict[str, Path]:
    """The scans that are meant, by a name that no two share; the same paths give the same names.

    Scans are called by their file name, and those of a folder by their path below it, without the suffix. Where that
    is one name for several, as of `siteA/CT` and `siteB/CT`, the folders above them are put before it, as many as it
    takes; those that differ in nothing but the suffix keep it.

    Args:
        paths: Scans, and folders of scans at any depth. A folder without scans is taken for that of one DICOM series.
        outside: A folder whose content is left out, such as that of results; it may lie in a folder of scans.

    Raises:
        ScanError: When a scan is given twice, or two of one folder differ in nothing but capitals.
        SpecError: When all of a folder of scans would be left out.
    """
    scans: dict[Path, Path] = {}  # as given, by the absolute path
    length: dict[Path, int] = {}  # how many parts of the path the name has
    for path in paths:
        for scan in _scans_of(path, outside):
            place = _absolute(scan)
            if place in scans:
                raise ScanError(f"{scan}: given twice; leave one out")
            scans[place] = scan
            length[place] = max(len(place.parts) - len(_absolute(path).parts), 1)
    stems = {place: place.with_name(without_suffix(place.name)) for place in scans}
    taken = Counter(map(_key, stems.values()))
    stems = {place: stem if taken[_key(stem)] == 1 else place for place, stem in stems.items()}
    while True:
        names = {place: Path(*stems[place].parts[-length[place] :]) for place in scans}
        times = Counter(map(_key, names.values()))
        shared = [place for place, name in names.items() if times[_key(name)] > 1]
        if not shared:
            return {printable(names[place].as_posix()): scan for place, scan in scans.items()}
        longer = {place: min(length[place] + 1, len(place.parts)) for place in shared}
        if all(length[place] == parts for place, parts in longer.items()):
            one, other = sorted(place for place in shared if _key(names[place]) == _key(names[shared[0]]))[:2]
            raise ScanError(
                f"{scans[one]}: its results would be called as those of {scans[other]}, on some file systems at least; "
                "rename one, or give them in runs with outputs of their own"
            )
        length |= longer


def _scans_of(path: Path, outside: Path | None) -> list[Path]:
    """The scans of a folder but for those that are left out, or the one scan that a path is."""
    if not path.is_dir():
        return [path]
    if outside is not None and _is_in(path, outside):
        raise SpecError(f"{outside}: is or holds the folder of scans {path}; choose an output of its own")
    return [scan for scan in find_scans(path) if outside is None or not _is_in(scan, outside)] or [path]


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, by whatever links either is named."""
    # The last part stays as it is: a link to a scan lies where the link is.
    where = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    return where.is_relative_to(folder.resolve())


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # without "..", and with the name of a link, not of what it leads to


def _key(name: Path) -> str:
    """What two names must not share: some file systems take `ct` for `CT`."""
    return str(name).casefold()


# --- outputs ----------------------------------------------------------------------------------------------------------


def place_files(named: Mapping[str, Path], folder: Path, suffix: str) -> dict[str, Path]:
    """Where the file that is made of each scan goes, by the scan's name.

    Args:
        named: Scans, see `name_scans`.
        folder: For all files.
        suffix: Theirs.

    Raises:
        SpecError: When that is the place of a scan, which would be taken for a file that is finished.
        OutputError: When a file cannot be written there.
    """
    files = {name: folder / f"{name}{suffix}" for name in named}
    scans = {scan.resolve() for scan in named.values()}
    for file in files.values():
        if file.resolve() in scans:
            raise SpecError(f"{file}: is a scan, and the output would go there; choose another one than {folder}")
    check_writable(*files.values())
    return files


class ScanTable:
    """A CSV file with a row a scan and a column a class; it is on disk in full after each row.

    The last two columns say which file the scan is and which model the numbers are of.

    Args:
        path: The file; rows that it has already stay.
        columns: Of numbers, besides the first, which is `scan`; see `class_columns`.
        model: Which one computes the numbers, see `medmim.identity`.

    Raises:
        SpecError: When the file has other columns, rows of another model, or is no CSV file.
        OutputError: When it cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, model: str) -> None:
        numbers = class_columns(columns, beside=("scan", "file", "model"))
        self.path, self.model, self.header = path, model, ["scan", *numbers, "file", "model"]
        self.rows: dict[str, list[str]] = {}
        check_writable(path)
        if not path.is_file():
            return
        header, rows = _read(path)
        if header != self.header:
            raise SpecError(
                f"{path}: has the columns {', '.join(header)}, as of another model or version of medmim; choose "
                "another output"
            )
        for row in rows:
            if row["model"] != model:
                raise SpecError(
                    f"{path}: has rows of another model, {row['model'] or 'without a name'}, and this is {model}; "
                    "choose another output, or delete what is there"
                )
            self.rows[row["scan"]] = [row[column] for column in header[1:]]

    def without_row(self, named: Mapping[str, Path]) -> dict[str, Path]:
        """The scans that have no row yet.

        Args:
            named: Scans, see `name_scans`.

        Raises:
            SpecError: When a row with the name of a scan is of another one.
        """
        for name, scan in named.items():
            if name in self.rows and self.rows[name][-2] != file_of(scan):
                raise SpecError(
                    f"{self.path}: its row {name} is of another scan, {self.rows[name][-2]}, and not of {scan}; choose "
                    "another output, or where the scan was moved, correct the row"
                )
        return {name: scan for name, scan in named.items() if name not in self.rows}

    def add(self, name: str, scan: Path, values: Iterable[float]) -> None:
        """Adds the row of a scan, or replaces it."""
        self.rows[name] = [*(f"{value:.6g}" for value in values), file_of(scan), self.model]
        write_csv(self.path, self.header, ([each, *row] for each, row in self.rows.items()))


def class_columns(classes: Iterable[str], *, beside: Sequence[str]) -> list[str]:
    """Columns of classes in a table: a class that is called as one of those beside has the word `class` before it."""
    return [f"class {name}" if name in beside else name for name in classes]


def file_of(scan: Path) -> str:
    """What an output says of the file that it is of, wherever the command was run."""
    return printable(str(_absolute(scan)))


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        return read_csv(path)
    except SpecError:
        raise SpecError(f"{path}: not readable as CSV in UTF-8; choose another output, or delete it") from None
