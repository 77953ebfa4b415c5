"""The decoder of a U-Net: from a feature pyramid to a map at full resolution, and that as a segmentation decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medmim.heads.scores import expect_background
from medmim.layers.convolution import ConvNorm, init_convolutional
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
            self.merge.append(ConvNorm(width + skip, width, activated=True))
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
                skip = skips.pop()
                d, h, w = skip.shape[2:]
                # Swin rounds odd sides up: what it added behind is cut off again.
                x = torch.cat([x[:, :, :d, :h, :w], skip], dim=1)  # (B, width + skip, d, h, w)
            x = merge(x)
        return self.to_voxels(x)


class UNetSegmentationDecoder(nn.Module):
    """A U-Net decoder over all maps of a pyramid.

    A pyramid that starts below full resolution gets the volume itself, after two convolutions, as its finest map; so
    does SwinUNETR (Hatamizadeh et al. 2022), whose other skips go through residual blocks, which are left out here.

    Args:
        encoder: One whose maps become coarser, such as a residual or a Swin encoder.
        num_classes: K, the background included.

    Raises:
        ValueError: For an encoder whose maps all have one resolution.
    """

    norm_taps = True  # has an effect on Swin, where it is SwinUNETR's choice

    def __init__(self, encoder: nn.Module, *, num_classes: int) -> None:
        super().__init__()
        channels = [info["num_chs"] for info in encoder.feature_info]
        reductions = [info["reduction"] for info in encoder.feature_info]
        if len(set(reductions)) < len(reductions) or len(reductions) < 2:
            raise ValueError("it takes a pyramid of maps, and those of this encoder have one resolution; use unetr")
        self.taps = tuple(range(len(channels) - 1))
        self.stem: nn.Module | None = None
        if reductions[0] != (1, 1, 1):
            width = channels[0] // 2
            self.stem = nn.Sequential(
                ConvNorm(encoder.in_chans, width), nn.LeakyReLU(0.01), ConvNorm(width, width), nn.LeakyReLU(0.01)
            )
            self.stem.apply(init_convolutional)
            channels, reductions = [width, *channels], [(1, 1, 1), *reductions]
        self.unet = UNetDecoder(channels, reductions, out_channels=num_classes)
        expect_background(self.unet.to_voxels)

    def forward(self, x: Tensor, maps: list[Tensor]) -> Tensor:
        """Scores (B, K, D, H, W) from the volume (B, in_chans, D, H, W) and all maps, fine to coarse."""
        return self.unet(maps if self.stem is None else [self.stem(x), *maps])


def _ratio(coarse: Size, fine: Size) -> Size:
    if any(c % f for c, f in zip(coarse, fine, strict=True)):
        raise ValueError(f"reduction {coarse} of a level is not a multiple of {fine}, that of the finer one")
    depth, height, width = (c // f for c, f in zip(coarse, fine, strict=True))
    return depth, height, width
