"""Scans with a class each: where they are, and which of them train, validate and test."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medmim.errors import SpecError
from medmim.formats import without_suffix
from medmim_training.tables import first_twice, read_rows
from medmim_training.tasks.cases import TRAINS, Case, with_splits

ARCHIVE = ".npz"
SIDES = {"train": {"fold": TRAINS}, "val": {"fold": 0}, "test": {"is_test": True}}  # of MedMNIST's archives


def find_labelled(
    data: str | Path, splits: str | Path | None = None, classes: Sequence[str] = ()
) -> tuple[list[Case], tuple[str, ...]]:
    """All cases of a classification, and the names of the classes.

    Args:
        data: A CSV file with the columns `image` (relative to it) and `label`, a name or a number from 0, and
            optionally `case` and those of `with_splits`; or an `.npz` file of MedMNIST's volumes, which has its own
            split.
        splits: See `with_splits`; not for an `.npz` file.
        classes: Their names by number; empty takes the labels themselves, in order, or "class 0", ... for numbers.

    Raises:
        SpecError: For data that does not exist or lacks something, a label that is no class, numbers that leave one
            out, two classes of one name, or fewer than two.
    """
    data = Path(data)
    if not data.is_file():
        raise SpecError(f"{data}: no such file; the data is a CSV with the columns image and label, or an .npz file")
    twice = first_twice(classes)
    if twice is not None:
        raise SpecError(f"{data}: two of classes= are called {twice!r}; give each a name of its own")
    if data.suffix == ARCHIVE:
        if splits is not None:
            raise SpecError(f"{data}: has its own split; leave splits= out")
        cases = _of_archive(data)
        numbers = [case.label for case in cases]
    else:
        rows = read_rows(data, needed=("image", "label"))
        numbers, classes = _numbered([row["label"] for row in rows], tuple(classes))
        images = [data.parent / row["image"] for row in rows]
        names = [row.get("case") or without_suffix(image.name) for row, image in zip(rows, images, strict=True)]
        cases = [Case(*each, group=each[0]) for each in zip(names, images, numbers, strict=True)]
        cases = with_splits(cases, dict(zip(names, rows, strict=True)), splits, source=data)
    if not classes:
        # At most as many as there are cases: a number above is not that of a class.
        count = min(max(numbers, default=-1) + 1, len(cases))
        unused = min(set(range(count)) - set(numbers), default=None)
        if unused is not None and max(numbers) < count:
            raise SpecError(
                f"{data}: its labels go up to {max(numbers)}, but none is {unused}; number the classes 0, 1, ..."
            )
        classes = tuple(f"class {i}" for i in range(count))
    wrong = [case.name for case, number in zip(cases, numbers, strict=True) if not 0 <= number < len(classes)]
    if wrong:
        raise SpecError(f"{data}: the label of {wrong[0]} is none of the {len(classes)} classes")
    if len(classes) < 2:
        raise SpecError(f"{data}: has fewer than two classes")
    return cases, classes


def _numbered(labels: list[str], classes: tuple[str, ...]) -> tuple[list[int], tuple[str, ...]]:
    """Labels as numbers, and the names of the classes where they are known; -1 for what is none of them."""
    if all(label.isdecimal() and label not in classes for label in labels):
        return [int(label) for label in labels], classes
    classes = classes or tuple(sorted(set(labels)))
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers.get(label, -1) for label in labels], classes


def _of_archive(path: Path) -> list[Case]:
    """The cases of a file with `train_images` (n, D, H, W), `train_labels` (n, 1), and so on for `val` and `test`."""
    try:
        # Opened here: of a broken file, numpy leaves its own open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {side: (archive[f"{side}_images"], archive[f"{side}_labels"]) for side in SIDES}
    except KeyError as error:
        raise SpecError(f"{path}: not a file of MedMNIST's volumes ({error.args[0]})") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SpecError(f"{path}: cannot be read ({error})") from None
    cases = []
    for side, (images, labels) in arrays.items():
        if images.ndim != 4 or images.shape[-1] <= 3:  # the flat ones have colours there
            raise SpecError(f"{path}: {side}_images are {images.shape}, not volumes (n, D, H, W)")
        if labels.size != len(images) or labels.dtype.kind not in "iu":
            raise SpecError(f"{path}: {side}_labels are no number for each of the {len(images)} volumes")
        for number, (image, label) in enumerate(zip(images, labels.reshape(-1).tolist(), strict=True)):
            name = f"{side}_{number:05d}"
            cases.append(Case(name, image, label, group=name, **SIDES[side]))
    return cases
