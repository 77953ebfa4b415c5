"""The patch embedding that token encoders start with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmim.layers.adapt import resize_patch_kernel
from medmim.layers.tokens import Size


class PatchEmbed(nn.Module):
    """Projects patches (B, N, V) to tokens (B, N, C).

    The weight has the shape of a convolution, as everywhere in the field, but is applied as the matrix that it is, so
    that it can be given a few patches only.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: Size) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def resized(self, patch_size: Size) -> PatchEmbed:
        """One for patches of another size, its weights resampled to fit and frozen where these are."""
        old = self.proj
        resized = PatchEmbed(old.in_channels, old.out_channels, patch_size).to(old.weight)
        with torch.no_grad():
            resized.proj.weight.copy_(resize_patch_kernel(old.weight, patch_size))
            resized.proj.bias.copy_(old.bias)
        return resized.requires_grad_(old.weight.requires_grad)
