"""Where scans to prepare come from: a folder, or a data list in CSV or JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from medmim.errors import SpecError
from medmim.folders import find_scans
from medmim.limits import LIST_BYTES, read_json
from medmim_training.tables import read_table

PATH_COLUMNS = ("file", "image", "path")
SPLITS = ("training", "validation", "test")
IMAGES, DATASET = "imagesTr", "dataset.json"  # of the Medical Segmentation Decathlon, and of nnU-Net
WITHOUT_TEST = ["split=training,validation"]
# As the Decathlon, BraTS and nnU-Net call a channel that is MR of some kind.
T1, T2 = ("T1", "T1W", "T1N", "T1C", "T1CE", "T1GD", "MPRAGE", "MP2RAGE"), ("T2", "T2W", "T2F", "FLAIR")
OTHERS = ("PD", "PDW", "DWI", "ADC", "SWI", "DTI", "BOLD", "FMRI")
MODALITIES = {"CT": "CT", "PET": "PET", "PT": "PET", **dict.fromkeys(("MR", "MRI", *T1, *T2, *OTHERS), "MR")}
CHANNEL = re.compile(r"_(\d{4})\.")  # how nnU-Net ends the name of a file that is one channel of a case


@dataclass(frozen=True)
class Source:
    """One scan to prepare; what a data list does not say is None or empty."""

    path: Path
    name: str
    modality: str | None = None
    group: str = ""
    license: str = ""


def find_sources(
    source: str | Path, where: Sequence[str] = (), *, tell: Callable[[str], None] = lambda text: None
) -> list[Source]:
    """Lists the scans of `source`.

    Args:
        source: One of
            - a folder, searched at any depth for scans and for folders of DICOM slices (`*.dcm`), a series each;
            - a folder as the Medical Segmentation Decathlon and nnU-Net have it, with `imagesTr`: what its
              `dataset.json` lists to train or validate and is there, else all of `imagesTr`, each file of the modality
              of its channel ("case_0001.nii.gz" of channel 1); neither labels nor, unless `where` says so, test cases;
            - a CSV with a column `file`, `image` or `path` (relative to the CSV) and optionally `modality` (its first
              word counts: "MR T1w" and "T1w" are MR; empty takes it from the scan), `group` and `licence`, in
              capitals or not;
            - a JSON data list as the Decathlon and MONAI write them: lists of file names, or of records with `image`,
              under `training`, `validation` and `test`; `modality` may stand in a record, or beside the lists.
        where: Filters on columns of a CSV, or on `split` of a JSON list: "split=train,pool" keeps rows whose split is
            one of the patterns, "group!=nd320*" drops those that match, in capitals or not. All must hold.
        tell: Called with a sentence on what is taken and what is left out, where that is not all that was found.

    Raises:
        SpecError: For a missing or malformed source, an unknown column or modality, nothing left, or rows of one scan
            that do not agree.
    """
    source = Path(source)
    if (source / IMAGES).is_dir():
        found = _of_decathlon(source, where, tell)
    elif source.is_dir():
        if where:
            raise SpecError(f"{source}: a folder has no columns to filter by; drop --where or give a data list")
        found = [Source(path, path.relative_to(source).as_posix()) for path in find_scans(source)]
    elif source.is_file() and source.suffix == ".csv":
        found = _from_rows(source, *read_table(source), where)
    elif source.is_file() and source.suffix == ".json":
        found = _from_rows(source, *_read_json(source), where)
    else:
        raise SpecError(f"{source}: neither a folder nor a data list (.csv, .json)")
    if not found:
        raise SpecError(f"{source}: no scan found" + (f" where {' and '.join(where)}" if where else ""))
    once = list(dict.fromkeys(found))  # a list may have a row a lesion
    path, times = Counter(each.path for each in once).most_common(1)[0]
    if times > 1:
        raise SpecError(f"{source}: its rows of {path} differ in name, modality, group or licence; leave one of them")
    if len(once) < len(found):
        tell(f"{source}: takes each scan once, {len(once)} of {len(found)} rows")
    return once


def _of_decathlon(folder: Path, where: Sequence[str], tell: Callable[[str], None]) -> list[Source]:
    listing = folder / DATASET
    data = read_json(listing, LIST_BYTES) if listing.is_file() else None
    listed = _from_rows(listing, ["image", "split"], _rows_of(data, listing), where or WITHOUT_TEST)
    found = [each for each in listed if each.path.exists()]
    if not found:  # as in a folder of nnU-Net, whose file lists none, or cases of which each channel is a file
        names = [path.relative_to(folder).as_posix() for path in find_scans(folder / IMAGES)]
        rows = [{"image": name, "split": "training", "modality": _decathlon_modality(data, name)} for name in names]
        listed = found = _from_rows(listing, ["image", "split"], rows, where or WITHOUT_TEST)
    if not found:
        return []
    taken = Counter(PurePosixPath(each.name).parent.as_posix() for each in found)
    others = {path.relative_to(folder).parts[0] for path in find_scans(folder)} - {*taken}
    told = [f"{folder}: takes " + ", ".join(f"{number} scans of {name}" for name, number in taken.items())]
    if others:
        told.append(f"leaves out {', '.join(sorted(others))}")
    if missing := len(listed) - len(found):
        told.append(f"{missing} that {DATASET} lists are not there")
    tell("; ".join(told))
    return found


def _read_json(source: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows."""
    rows = _rows_of(read_json(source, LIST_BYTES), source)
    if not rows:
        raise SpecError(f"{source}: lists no scans under {', '.join(SPLITS)}")
    return ["image", "split", "modality"], rows


def _rows_of(data: Any, source: Path) -> list[dict[str, str]]:
    """The scans of a JSON list, with the name of the list each was in as its `split`."""
    lists = {name: items for name, items in data.items() if name in SPLITS} if isinstance(data, dict) else {}
    rows = []
    for split, items in lists.items():
        for item in items if isinstance(items, list) else [items]:
            name = item.get("image") if isinstance(item, dict) else item
            if not isinstance(name, str):
                raise SpecError(f"{source}: {split!r} must list file names, or records whose image is one file name")
            own = item.get("modality") if isinstance(item, dict) else None
            rows.append({"image": name, "split": split, "modality": str(own or _decathlon_modality(data, name))})
    return rows


def _decathlon_modality(data: Any, name: str) -> str:
    """What `dataset.json` calls a file's channel, such as "CT" or "FLAIR"; nothing where it does not say."""
    names = (data.get("modality") or data.get("channel_names")) if isinstance(data, dict) else None
    if not isinstance(names, dict):
        return names if isinstance(names, str) else ""
    channel = CHANNEL.search(PurePosixPath(name).name)
    # The digits may number cases, too, of which the file is the first channel then.
    return str(names.get(str(int(channel[1])) if channel else "0", names.get("0", "")))


def _modality(text: str, where: str) -> str | None:
    """The modality that a list means; None where it says nothing."""
    words = re.findall(r"\w+", text.replace("_", " "))
    if not words:
        return None
    if words[0].upper() not in MODALITIES:
        known = ", ".join(MODALITIES)
        raise SpecError(f"{where}: the modality {text!r} is none of {known}; write one, or leave it empty")
    return MODALITIES[words[0].upper()]


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
            modality=_modality(row.get("modality", ""), f"{source}: row {number}"),
            group=row.get("group", ""),
            license=row.get("licence") or row.get("license") or "",
        )
        for number, row in enumerate(rows, start=1)
        if all(any(fnmatchcase(row[c].lower(), p) for p in patterns) == keep for c, patterns, keep in filters)
    ]


def _parse_filter(text: str, columns: list[str], source: Path) -> tuple[str, list[str], bool]:
    column, separator, patterns = text.partition("=")
    keep = not column.endswith("!")
    column = column.removesuffix("!").strip().lower()
    if not separator or column not in columns:
        raise SpecError(f"{text!r}: write column=pattern or column!=pattern; {source} has {', '.join(columns)}")
    return column, patterns.lower().split(","), keep
