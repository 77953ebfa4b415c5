"""Labelled scans: where they are, and which of them train, validate and test.

Nobody is on both sides: cases of one subject are never split between training and validation, and `test` cases are
never trained on nor validated with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from medmim.errors import ScanError, SpecError
from medmim.folders import find_scans
from medmim.formats import without_suffix
from medmim.labels import label_type, labels_on_grid
from medmim.layers.tokens import Size
from medmim.limits import LIST_BYTES, read_json
from medmim.transforms import VolumeTransform
from medmim.volumes import Volume, load_volume
from medmim_training.store.sources import DATASET, IMAGES
from medmim_training.tables import first_twice, read_rows

LABELS, SPLITS = "labelsTr", "subjects.csv"
MEAN = "mean"  # in results, beside the names of the classes
FOLDS = 5
SPLIT_WORDS = {"": "train", "train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}
SPLIT_COLUMNS = ("fold", "split", "subject_group")
SCALING = 0.01  # how far a scaling in the header may put a label off
TRAINS = -1  # in place of a fold, where the data says who validates: that of a case that never does


@dataclass(frozen=True)
class Case:
    """A scan and its labels.

    Attributes:
        image: A file, or the voxels themselves where one file holds many.
        label: A file with a label a voxel, or the number of the scan's class.
        group: Of cases that belong together, such as one subject's; the case itself where nothing is said.
        fold: Which fold it validates in.
        is_test: Whether it is kept for the last evaluation.
    """

    name: str
    image: Path | np.ndarray = field(compare=False)
    label: Path | int
    group: str
    fold: int = 0
    is_test: bool = False


@dataclass(frozen=True)
class Split:
    """Who trains, validates and is kept for the last evaluation."""

    training: tuple[Case, ...]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]


@dataclass(frozen=True, eq=False)
class LoadedCase:
    """A case on the network's grid.

    Attributes:
        x: (C, D, H, W) float32 in network units.
        labels: (D, H, W) uint8, or int16 for more than 256 classes.
        spacing: In mm along (D, H, W).
    """

    name: str
    x: Tensor
    labels: Tensor
    spacing: tuple[float, float, float]


# --- finding ----------------------------------------------------------------------------------------------------------


def find_cases(data: str | Path, splits: str | Path | None = None) -> list[Case]:
    """All labelled cases, by name, with what the split file says of them.

    Args:
        data: A Decathlon folder, or a CSV file with the columns `image` and `label` (relative to it), and optionally
            those of a split file.
        splits: A CSV file as for `with_splits`; None for `subjects.csv` in the folder, where it is there.

    Raises:
        SpecError: For a folder without labelled scans, or a split file that leaves cases out.
    """
    data = Path(data)
    if data.is_dir():
        cases, rows = _of_folder(data), None
        if splits is None and (data / SPLITS).is_file():
            splits = data / SPLITS
    elif data.is_file():
        table = read_rows(data, needed=("image", "label"))
        cases = [_of_row(row, data) for row in table]
        rows = {case.name: row for case, row in zip(cases, table, strict=True)}
    else:
        raise SpecError(f"{data}: neither a folder with {IMAGES} and {LABELS} nor a CSV file")
    return with_splits(cases, rows, splits, source=data)


def with_splits(
    cases: list[Case], rows: dict[str, dict[str, str]] | None, splits: str | Path | None, *, source: str | Path
) -> list[Case]:
    """The cases with what is said of who trains, validates and tests; without any word of it, folds are drawn.

    Args:
        cases: As they were found.
        rows: What the data itself says, by case.
        splits: A CSV file that counts instead, with the column `case` and any of `fold`, `split` and `subject_group`.
            A `split` of "test" is kept for the last evaluation; where there are no folds and some of it is "val", those
            validate, as fold 0.
        source: Of `rows`, for the error.

    Raises:
        SpecError: For two cases of one name, and for a split file that leaves cases out, names one twice, says what has
            no meaning, or says nothing.
    """
    twice = first_twice(case.name for case in cases)
    if twice:
        raise SpecError(f"{source}: two cases are called {twice}; give each a name of its own in a column case")
    if splits is not None:
        table = read_rows(Path(splits), needed=("case",))
        twice = first_twice(row["case"] for row in table)
        if twice:
            raise SpecError(f"{splits}: has two rows for {twice}; leave one")
        if table and table[0].keys().isdisjoint(SPLIT_COLUMNS):
            raise SpecError(f"{splits}: has none of the columns {', '.join(SPLIT_COLUMNS)}; give one of them")
        rows = {row["case"]: row for row in table}
    if rows is None:
        return _draw_folds(cases)
    source = str(splits or source)
    sides = {case.name: _side(case, rows, source) for case in cases}
    has_folds = any(row.get("fold") for row in rows.values())
    cases = [_described(case, rows[case.name], sides[case.name], has_folds, source) for case in cases]
    if has_folds:
        return cases
    if "val" not in sides.values():
        return _draw_folds(cases)
    return [replace(case, fold=0 if sides[case.name] == "val" else TRAINS) for case in cases]


def split_cases(cases: Sequence[Case], fold: int, *, source: str) -> Split:
    """Training and validation by fold, and the test cases.

    Args:
        cases: Of `find_cases`.
        fold: That validates.
        source: Named in the error.

    Raises:
        SpecError: For a fold that nobody is in, or a group or file that is on two sides.
    """
    used = [case for case in cases if not case.is_test]
    split = Split(
        training=tuple(case for case in used if case.fold != fold),
        validation=tuple(case for case in used if case.fold == fold),
        test=tuple(case for case in cases if case.is_test),
    )
    if len({case.group for case in used}) < 2:
        raise SpecError(f"{source}: one subject trains and another one validates, so it takes two besides the test")
    if not split.training or not split.validation:
        folds = sorted({case.fold for case in used} - {TRAINS})
        raise SpecError(f"{source}: fold {fold} leaves nobody to train or validate with; there are folds {folds}")
    sides = (split.training, split.validation, split.test)
    subjects = _on_two_sides([{case.group for case in side} for side in sides])
    if subjects:
        raise SpecError(
            f"{source}: subject {min(subjects)} is in more than one of training, validation and test; give all of its "
            "cases one fold and one split"
        )
    files = _on_two_sides([{case.image for case in side if isinstance(case.image, Path)} for side in sides])
    if files:
        raise SpecError(
            f"{source}: {min(files)} is in more than one of training, validation and test; give its cases one "
            "subject_group"
        )
    return split


def _on_two_sides(sides: Sequence[set[Any]]) -> set[Any]:
    """What more than one of some sets have."""
    return set().union(*(one & other for one, other in combinations(sides, 2)))


def choose(cases: Sequence[Case], number: int, *, seed: int) -> tuple[Case, ...]:
    """Some of the cases; fewer of them are always among more of them, for the same seed."""
    order = np.random.default_rng(seed).permutation(len(cases))
    return tuple(cases[i] for i in sorted(order[:number].tolist()))


def find_classes(data: str | Path, given: Sequence[str]) -> tuple[str, ...]:
    """The names of the classes by label: those given, or those of the Decathlon's `dataset.json`.

    Raises:
        SpecError: When there are none, or two are alike, or one is what the mean over them is called in results.
    """
    path = Path(data) / DATASET
    names = tuple(given) if given or not path.is_file() else _classes_of(path)
    if len(names) < 2:
        raise SpecError(f"{data}: nothing names the classes; give classes=[background,NAME,...] in the recipe")
    if (twice := first_twice(names)) is not None:
        raise SpecError(f"{data}: two classes are called {twice!r}; give each a name of its own with classes=")
    if MEAN in names:
        raise SpecError(f"{data}: no class may be called {MEAN!r}, as their mean is; give classes= in the recipe")
    return names


def _classes_of(path: Path) -> tuple[str, ...]:
    """The names in a `dataset.json`."""
    try:
        names = {int(label): str(name) for label, name in read_json(path, LIST_BYTES)["labels"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SpecError(f'{path}: no "labels" that map 0, 1, ... to names; give classes= in the recipe') from None
    if sorted(names) != list(range(len(names))):
        raise SpecError(f"{path}: labels must be 0, 1, 2, ... without gaps, not {sorted(names)}")
    return tuple(names[label] for label in range(len(names)))


def _of_folder(folder: Path) -> list[Case]:
    cases = []
    for image in find_scans(folder / IMAGES):
        label = folder / LABELS / image.name
        if not label.is_file():
            raise SpecError(f"{image}: has no labels, {label} is missing")
        name = without_suffix(image.name)
        cases.append(Case(name, image, label, group=name))
    if not cases:
        raise SpecError(f"{folder}: no scans in {IMAGES}; it must have {IMAGES} and {LABELS}, or give a CSV file")
    return cases


def _of_row(row: dict[str, str], source: Path) -> Case:
    image = source.parent / row["image"]
    name = row.get("case") or without_suffix(image.name)
    return Case(name, image, source.parent / row["label"], group=name)


def _side(case: Case, rows: dict[str, dict[str, str]], source: str) -> str:
    """What the row of a case says of it: "train", "val" or "test"."""
    row = rows.get(case.name)
    if row is None:
        raise SpecError(f"{source}: says nothing of {case.name}; add a row, or take the case out of the data")
    word = row.get("split", "")
    try:
        return SPLIT_WORDS[word.lower()]
    except KeyError:
        known = ", ".join(filter(None, SPLIT_WORDS))
        raise SpecError(f"{source}: the split of {case.name} is {word!r}, which is none of {known}") from None


def _described(case: Case, row: dict[str, str], side: str, has_folds: bool, source: str) -> Case:
    fold = row.get("fold", "")
    if has_folds and side != "test" and not fold:
        raise SpecError(f"{source}: gives {case.name} no fold, as it does others; give it one, or the split test")
    try:
        number = int(fold.removesuffix(".0") or 0)  # as pandas writes a column in which test cases have none
    except ValueError:
        raise SpecError(f"{source}: the fold of {case.name} is {fold!r}, not a number") from None
    return replace(case, group=row.get("subject_group") or case.name, fold=number, is_test=side == "test")


def _draw_folds(cases: list[Case]) -> list[Case]:
    """Deals groups to folds at random, the same each time; none to cases that are kept for the test."""
    groups = sorted({case.group for case in cases if not case.is_test})
    order = np.random.default_rng(0).permutation(len(groups))
    fold = {groups[i]: place % FOLDS for place, i in enumerate(order.tolist())}
    return [case if case.is_test else replace(case, fold=fold[case.group]) for case in cases]


# --- loading ----------------------------------------------------------------------------------------------------------


def load_case(case: Case, transform: VolumeTransform, *, num_classes: int) -> LoadedCase:
    """Reads a case and brings it to the network's grid.

    Args:
        case: Where it is.
        transform: That pads nothing.
        num_classes: Labels must be below.

    Raises:
        ScanError: For a scan or labels that cannot be used, do not lie on each other, or hold other values.
    """
    x = transform(case.image)
    labels = labels_on_grid(load_labels(case.label, num_classes=num_classes), like=x)
    return LoadedCase(case.name, x.as_tensor(), labels.to(label_type(num_classes)), tuple(x.pixdim.tolist()))


def load_labels(path: Path, *, num_classes: int) -> Volume:
    """Reads a file with a label a voxel.

    Labels that a scaling in the header puts a little off, as programs write it that keep real numbers in few bits, are
    rounded.

    Raises:
        ScanError: When it cannot be read, or holds anything but whole numbers from 0 to below `num_classes`.
    """
    labels = load_volume(path)
    values = np.unique(labels.array)
    whole = np.round(values)
    wrong = values[~(np.abs(values - whole) <= SCALING) | (whole < 0) | (whole >= num_classes)]
    if len(wrong):
        found = ", ".join(f"{value:.9g}" for value in wrong[:8].tolist())
        raise ScanError(
            f"{path}: labels must be 0 to {num_classes - 1}, one a class, but it holds {found}; save it as whole "
            "numbers, or name all classes"
        )
    return labels if np.array_equal(values, whole) else replace(labels, array=np.round(labels.array))


def pad_around(x: Tensor, size: Size, *, value: float) -> tuple[Tensor, tuple[slice, slice, slice]]:
    """Pads (C, D, H, W) with `value` to at least `size`, around it as the "pad" of `VolumeTransform` does.

    Returns:
        What is padded, and where in its (D, H, W) the voxels of `x` are.
    """
    missing = [max(0, wanted - side) for wanted, side in zip(size, x.shape[1:], strict=True)]
    if not any(missing):  # padding by nothing would copy
        return x, tuple(slice(0, side) for side in x.shape[1:])
    inside = tuple(slice(room // 2, room // 2 + side) for room, side in zip(missing, x.shape[1:], strict=True))
    pad = [part for room in reversed(missing) for part in (room // 2, room - room // 2)]
    return F.pad(x, pad, value=value), inside
