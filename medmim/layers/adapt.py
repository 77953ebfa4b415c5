"""Fitting the first projection of a network, and the last one of a decoder, to other patches and input channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medmim.layers.tokens import Size


def resize_patch_kernel(weight: Tensor, patch_size: Size) -> Tensor:
    """Resizes a patch projection so that a resized patch gives the same token (Beyer et al. 2023, FlexiViT).

    If R resizes a patch linearly, the new kernel is the least-squares solution of <R x, new> = <x, old>. R is a
    product of one matrix an axis, and so is its pseudo-inverse.

    Args:
        weight: (C, in_chans, p, q, r).
        patch_size: The new (p, q, r).

    Returns:
        (C, in_chans, *patch_size), in the dtype of `weight`.
    """
    resized = weight.float()
    for axis, (old, new) in enumerate(zip(weight.shape[2:], patch_size, strict=True), start=2):
        if old != new:
            identity = torch.eye(old, device=weight.device)[None]  # (1, old, old): one unit patch a row
            resize = F.interpolate(identity, size=new, mode="linear", align_corners=False)[0].T  # R: (new, old)
            resized = torch.tensordot(resized, torch.linalg.pinv(resize.T), dims=([axis], [1])).movedim(-1, axis)
    return resized.to(weight.dtype)


def resize_patch_output(weight: Tensor, old: Size, new: Size) -> Tensor:
    """Resizes the layer that predicts the voxels of a patch: each new voxel is the mean of the old ones in its place.

    Args:
        weight: Its weight (in_chans * prod(old), C) or its bias (in_chans * prod(old),).
        old: Voxels of a patch along (D, H, W).
        new: Likewise.

    Returns:
        (in_chans * prod(new), C) or (in_chans * prod(new),).
    """
    rows = weight.reshape(weight.shape[0], -1)  # (in_chans * V, C)
    voxels = rows.unflatten(0, (-1, *old)).movedim(-1, 1)  # (in_chans, C, p, q, r)
    resized = F.interpolate(voxels, size=new, mode="area").movedim(1, -1).flatten(0, 3)
    return resized.reshape(-1, *weight.shape[1:])


def adapt_in_chans(weight: Tensor, in_chans: int) -> Tensor:
    """Fits a first convolution (C, old, p, q, r), patch projection or stem, to another number of input channels.

    One channel gets the sum over the old ones; several get the old ones in turn, times old over new, as in timm. Where
    each is taken as often as the others, an input repeated over the channels gives what it gave before.
    """
    old = weight.shape[1]
    if in_chans == old:
        return weight
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, torch.arange(in_chans) % old] * (old / in_chans)
