"""Labels of voxels: their type, whether they lie on their scan, and how they come to the grid of a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from monai.data import MetaTensor

from medmim.errors import ScanError
from medmim.resampling import resample_to
from medmim.scans import same_place

if TYPE_CHECKING:
    from medmim.volumes import Volume


def label_type(num_classes: int) -> torch.dtype:
    """The smallest type that voxels' labels of so many classes are kept in."""
    return torch.uint8 if num_classes <= 256 else torch.int16


def labels_on_grid(labels: Volume, *, like: MetaTensor) -> torch.Tensor:
    """Brings the labels of a scan to the grid that the scan was brought to, each voxel from the nearest.

    Args:
        labels: In the scan's own voxels, one channel.
        like: What a `VolumeTransform` made of the scan.

    Returns:
        (D, H, W) float32 on the grid of `like`; zero outside of the scan.

    Raises:
        ScanError: When the labels do not have the scan's shape and place.
    """
    shape, affine = tuple(like.meta["original_shape"]), np.asarray(like.meta["original_affine"])
    check_labels_place(labels, shape=shape, affine=affine)
    source = MetaTensor(torch.from_numpy(labels.array.astype(np.float32)), affine=torch.as_tensor(labels.affine))
    return resample_to(source, like.affine, like.shape[1:], mode="nearest")[0].as_tensor()


def check_labels_place(labels: Volume, *, shape: tuple[int, ...], affine: np.ndarray) -> None:
    """Refuses labels that have not the shape (D, H, W) and the affine (4, 4) of their scan.

    Raises:
        ScanError: With what differs.
    """
    if labels.array.shape[1:] != shape or not same_place(labels.affine, affine, shape):
        raise ScanError(
            f"{labels.name}: does not lie on its scan ({labels.array.shape[1:]} voxels for {shape}, or another affine)"
            "; resample it to the scan"
        )
