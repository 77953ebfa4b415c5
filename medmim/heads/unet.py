"""The decoder of a U-Net: from a feature pyramid to a map at full resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medmim.layers.convolution import ConvNorm, init_convolutional, leaky_relu_
from medmim.layers.tokens import Size


class UNetDecoder(nn.Module):
    """Upsamples level by level, merging each with the encoder's map of that resolution (Ronneberger et al. 2015).

    It is nnU-Net's with one convolution a level and no deep supervision, and gives what the `UNetDecoder` of
    `dynamic-network-architectures` gives with the same weights. A pyramid whose finest level is below full resolution
    (Swin) gets one level more here, without a map to merge.

    Args:
        channels: Channels of the pyramid's levels, fine to coarse.
        reductions: Voxels along (D, H, W) to one position of each level; each a multiple of the one before.
        out_channels: Channels of the map.

    Raises:
        ValueError: For reductions that do not divide.
    """

    def __init__(self, channels: Sequence[int], reductions: Sequence[Size], *, out_channels: int) -> None:
        super().__init__()
        self.num_levels = len(channels)
        reductions = [tuple(reduction) for reduction in reductions]
        # From coarse to fine: width, reduction and channels of the encoder's map to merge.
        steps = list(zip(channels[:-1], reductions[:-1], channels[:-1], strict=True))[::-1]
        if reductions[0] != (1, 1, 1):
            steps.append((channels[0], (1, 1, 1), 0))
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        below, coarse = channels[-1], reductions[-1]
        for width, fine, skip in steps:
            stride = _ratio(coarse, fine)
            self.up.append(nn.ConvTranspose3d(below, width, kernel_size=stride, stride=stride))
            self.merge.append(ConvNorm(width + skip, width))
            below, coarse = width, fine
        self.to_voxels = nn.Conv3d(below, out_channels, kernel_size=1)
        self.apply(init_convolutional)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Decodes a pyramid, as an encoder's `forward_intermediates` gives it.

        Args:
            pyramid: Maps (B, C, d, h, w), fine to coarse.

        Returns:
            (B, out_channels, D, H, W).
        """
        if len(pyramid) != self.num_levels:
            raise ValueError(f"the decoder takes {self.num_levels} maps, one a level, not {len(pyramid)}")
        *skips, x = pyramid
        for up, merge in zip(self.up, self.merge, strict=True):
            x = up(x)
            if skips:
                x = torch.cat([x, skips.pop()], dim=1)  # (B, width + skip, d, h, w)
            x = leaky_relu_(merge(x))
        return self.to_voxels(x)


def _ratio(coarse: Size, fine: Size) -> Size:
    if any(c % f for c, f in zip(coarse, fine, strict=True)):
        raise ValueError(f"reduction {coarse} of a level is not a multiple of {fine}, that of the finer one")
    depth, height, width = (c // f for c, f in zip(coarse, fine, strict=True))
    return depth, height, width
