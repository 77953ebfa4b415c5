"""Where scans to prepare come from: a folder, or a data list in CSV or JSON."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from medmim.errors import SpecError
from medmim.limits import LIST_BYTES, read_csv, read_json
from medmim.volumes import find_scans

PATH_COLUMNS = ("file", "image", "path")
SPLITS = ("training", "validation", "test")
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
        source: One of
            - a folder, searched at any depth for scans and for folders of DICOM slices (`*.dcm`), a series each;
            - a CSV with a column `file`, `image` or `path` (relative to the CSV) and optionally `modality` (its first
              word counts: "MR T1w" is MR), `group` and `licence`;
            - a JSON data list as the Medical Segmentation Decathlon and MONAI write them: lists of file names, or of
              records with `image`, under `training`, `validation` and `test`.
        where: Filters on columns of a CSV, or on `split` of a JSON list: "split=train,pool" keeps rows whose split is
            one of the patterns, "group!=nd320*" drops those that match. All must hold.

    Raises:
        SpecError: For a missing or malformed source, an unknown column, or nothing left.
    """
    source = Path(source)
    if source.is_dir():
        if where:
            raise SpecError(f"{source}: a folder has no columns to filter by; drop --where or give a data list")
        found = _search(source)
    elif source.is_file() and source.suffix == ".csv":
        found = _from_rows(source, *read_csv(source), where)
    elif source.is_file() and source.suffix == ".json":
        found = _from_rows(source, *_read_json(source), where)
    else:
        raise SpecError(f"{source}: neither a folder nor a data list (.csv, .json)")
    if not found:
        raise SpecError(f"{source}: no scan found" + (f" where {' and '.join(where)}" if where else ""))
    return found


def _search(folder: Path) -> list[Source]:
    return [Source(path, str(path.relative_to(folder))) for path in find_scans(folder)]


def _read_json(source: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows, with the name of the list each row was in as its `split`."""
    data = read_json(source, LIST_BYTES)
    lists = {name: items for name, items in data.items() if name in SPLITS} if isinstance(data, dict) else {}
    rows = []
    for split, items in lists.items():
        for item in items if isinstance(items, list) else [items]:
            name = item.get("image") if isinstance(item, dict) else item
            if not isinstance(name, str):
                raise SpecError(f"{source}: {split!r} must list file names, or records whose image is one file name")
            rows.append({"image": name, "split": split, "modality": _decathlon_modality(data)})
    if not rows:
        raise SpecError(f"{source}: lists no scans under {', '.join(SPLITS)}")
    return ["image", "split", "modality"], rows


def _decathlon_modality(data: dict) -> str:
    """What `dataset.json` calls the first channel: "CT", or a sequence of MR."""
    names = data.get("modality")
    first = str(names.get("0", "")) if isinstance(names, dict) else ""
    return first if first.upper() in MODALITIES else ("MR" if first else "")


def _from_rows(source: Path, columns: list[str], rows: list[dict[str, str]], where) -> list[Source]:
    path_column = next((column for column in PATH_COLUMNS if column in columns), None)
    if path_column is None:
        raise SpecError(f"{source}: needs a column {' or '.join(PATH_COLUMNS)}, has {', '.join(columns)}")
    filters = [_parse_filter(text, columns, source) for text in where]
    for number, row in enumerate(rows, start=1):
        if not row[path_column]:
            raise SpecError(f"{source}: row {number} has no {path_column}")
    return [
        Source(
            path=source.parent / row[path_column],
            name=row[path_column],
            modality=MODALITIES.get((row.get("modality") or "").split(" ")[0].upper()),
            group=row.get("group") or "",
            license=row.get("licence") or row.get("license") or "",
        )
        for row in rows
        if all(any(fnmatchcase(row[c] or "", p) for p in patterns) == keep for c, patterns, keep in filters)
    ]


def _parse_filter(text: str, columns: list[str], source: Path) -> tuple[str, list[str], bool]:
    column, separator, patterns = text.partition("=")
    keep = not column.endswith("!")
    column = column.removesuffix("!")
    if not separator or column not in columns:
        raise SpecError(f"{text!r}: write column=pattern or column!=pattern; {source} has {', '.join(columns)}")
    return column, patterns.split(","), keep
