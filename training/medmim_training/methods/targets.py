"""What a method predicts for the hidden patches, as functions of the patches (B, M, V)."""

from __future__ import annotations

from torch import Tensor


def voxels(patches: Tensor) -> Tensor:
    """The scaled voxels themselves (Chen et al. 2023)."""
    return patches


def normalised(patches: Tensor) -> Tensor:
    """Each patch with zero mean and unit variance (He et al. 2022, section 4.1).

    The variance has a floor of 1e-6 in scaled units: a patch of air has almost none, and dividing by it would make a
    target of noise.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True, unbiased=False)
    return (patches - mean) / variance.clamp(min=1e-6).sqrt()


TARGETS = {"voxels": voxels, "normalised": normalised}
