"""Labelled volumes made by formula, for trying things out: a ball and a box in texture, with exact labels."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from medmim.files import atomic_write, write_csv, write_text
from medmim_training.store.sources import DATASET, IMAGES
from medmim_training.tasks.cases import LABELS, SPLITS

CLASSES = ("background", "ball", "box")
FOLDS = 2
SHAPE = (24, 30, 26)  # voxels of 1 mm


def write_shapes(folder: str | Path, *, cases: int, tests: int, seed: int = 0) -> None:
    """Writes a folder in the layout of the Medical Segmentation Decathlon, with a split; what is there is replaced.

    Args:
        folder: Where to.
        cases: How many volumes.
        tests: How many of them, the last ones, are kept for the test; the others are dealt to two folds.
        seed: Decides all volumes.
    """
    folder, rows = Path(folder), []
    for number in range(cases):
        name = f"shapes_{number:03d}"
        image, labels = draw_shapes(np.random.default_rng([seed, number]))
        for kind, array in ((IMAGES, image), (LABELS, labels)):
            with atomic_write(folder / kind / f"{name}.nii.gz") as path:
                nib.Nifti1Image(array, np.eye(4)).to_filename(path)
        is_test = number >= cases - tests
        rows.append((name, number, number % FOLDS, "test" if is_test else "train"))
    write_csv(folder / SPLITS, ("case", "subject_group", "fold", "split"), rows)
    write_text(folder / DATASET, json.dumps({"labels": dict(enumerate(CLASSES))}) + "\n")


def draw_shapes(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (D, H, W) float32 and its labels (D, H, W) uint8: 1 inside of the ball, 2 inside of the box.

    The box may cut a piece out of the ball; it is the brighter one.
    """
    labels = np.zeros(SHAPE, np.uint8)
    centre = generator.uniform(7, np.array(SHAPE) - 7)
    radius = generator.uniform(4, 6)
    places = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)  # (D, H, W, 3)
    labels[((places - centre) ** 2).sum(axis=-1) < radius**2] = 1
    sides = generator.integers(6, 10, size=3)
    corner = generator.integers(0, np.array(SHAPE) - sides)
    labels[tuple(slice(start, start + side) for start, side in zip(corner, sides, strict=True))] = 2
    image = gaussian_filter(generator.normal(100, 60, SHAPE), 1) + 60.0 * labels
    return image.astype(np.float32), labels
