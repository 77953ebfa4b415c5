"""What a method predicts for the hidden patches, as functions of the patches (B, M, V)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Target(NamedTuple):
    """What is predicted of a patch, and how that is shown.

    Attributes:
        of: The target, from patches.
        to_voxels: Voxels, from what was predicted and the patches that it was predicted for.
    """

    of: Callable[[Tensor], Tensor]
    to_voxels: Callable[[Tensor, Tensor], Tensor]


def voxels(patches: Tensor) -> Tensor:
    """The scaled voxels themselves (Chen et al. 2023)."""
    return patches


def normalised(patches: Tensor) -> Tensor:
    """Each patch with zero mean and unit variance (He et al. 2022, section 4.1)."""
    mean, deviation = _statistics(patches)
    return (patches - mean) / deviation


def denormalised(predicted: Tensor, patches: Tensor) -> Tensor:
    """Voxels with the mean and variance that the patches have, as He et al. 2022 draw them: no network knows these."""
    mean, deviation = _statistics(patches)
    return predicted * deviation + mean


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch (B, M, 1).

    The variance has a floor of 1e-6 in scaled units: a patch of air has almost none, and dividing by it would make a
    target of noise.
    """
    variance = patches.var(dim=-1, keepdim=True, unbiased=False)
    return patches.mean(dim=-1, keepdim=True), variance.clamp(min=1e-6).sqrt()


TARGETS = {"voxels": Target(voxels, lambda predicted, _: predicted), "normalised": Target(normalised, denormalised)}
