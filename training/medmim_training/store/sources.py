"""Where scans to prepare come from: a folder, or a CSV data list."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from medmim.errors import SpecError

SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
PATH_COLUMNS = ("file", "image", "path")
MODALITIES = {"CT": "CT", "MR": "MR", "MRI": "MR", "PET": "PET", "PT": "PET"}


@dataclass(frozen=True)
class Source:
    """One scan to prepare; what a data list does not say is None or empty."""

    path: Path
    name: str
    modality: str | None = None
    group: str = ""
    license: str = ""


def find_sources(source: str | Path, where: list[str] | tuple[str, ...] = ()) -> list[Source]:
    """Lists the scans of `source`.

    Args:
        source: A folder, searched for scans at any depth, or a CSV with a column `file`, `image` or `path` (relative
            to the CSV) and optionally `modality` (its first word counts: "MR T1w" is MR), `group` and `licence`.
        where: Filters on columns of the CSV: "split=train,pool" keeps rows whose split is one of the patterns,
            "group!=nd320*" drops those that match. All must hold.

    Raises:
        SpecError: For a missing source, a list without a path column, an unknown column, or nothing left.
    """
    source = Path(source)
    if source.is_dir():
        if where:
            raise SpecError(f"{source}: a folder has no columns to filter by; drop --where or give a CSV")
        paths = sorted(path for path in source.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
        found = [Source(path, str(path.relative_to(source))) for path in paths]
    elif source.suffix == ".csv" and source.is_file():
        found = _read_csv(source, where)
    else:
        raise SpecError(f"{source}: no folder and no CSV data list")
    if not found:
        raise SpecError(f"{source}: no scan found" + (f" where {' and '.join(where)}" if where else ""))
    return found


def _read_csv(source: Path, where: list[str] | tuple[str, ...]) -> list[Source]:
    with open(source, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        path_column = next((column for column in PATH_COLUMNS if column in columns), None)
        if path_column is None:
            raise SpecError(f"{source}: needs a column {' or '.join(PATH_COLUMNS)}, has {', '.join(columns)}")
        filters = [_parse_filter(text, columns, source) for text in where]
        return [
            Source(
                path=source.parent / row[path_column],
                name=row[path_column],
                modality=MODALITIES.get((row.get("modality") or "").split(" ")[0].upper()),
                group=row.get("group") or "",
                license=row.get("licence") or row.get("license") or "",
            )
            for row in reader
            if all(any(fnmatchcase(row[c] or "", p) for p in patterns) == keep for c, patterns, keep in filters)
        ]


def _parse_filter(text: str, columns: list[str], source: Path) -> tuple[str, list[str], bool]:
    column, separator, patterns = text.partition("=")
    keep = not column.endswith("!")
    column = column.removesuffix("!")
    if not separator or column not in columns:
        raise SpecError(f"{text!r}: write column=pattern or column!=pattern; {source} has {', '.join(columns)}")
    return column, patterns.split(","), keep
