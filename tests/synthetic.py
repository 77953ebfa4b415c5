"""Scans made by formula, for tests."""

from __future__ import annotations

import nibabel as nib
import numpy as np


def write_scan(path, shape=(40, 44, 48), *, seed: int = 0, ct: bool = False, spacing=(2.0, 2.0, 2.0)) -> None:
    """An ellipsoid of smooth texture in air, as a NIfTI file."""
    generator = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    texture = sum(np.cos(generator.uniform(2, 9) * axis + generator.uniform(0, 6)) for axis in axes)
    inside = sum(axis**2 for axis in axes) < 0.9
    array = np.where(inside, 300 + 100 * texture, -1000 if ct else 0)
    nib.Nifti1Image(array.round().astype(np.int16), np.diag([*spacing, 1.0])).to_filename(path)
