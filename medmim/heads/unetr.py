"""The decoder of UNETR: from a plain transformer's hidden states to voxels, of MONAI's blocks.

Hatamizadeh et al. 2022 (arXiv 2103.10504), as Chen et al. 2023 fine-tune with it: the deepest input is the encoder's
normed output, the others are hidden states before the norm; of 12 blocks and patches of 16, those after blocks 3, 6 and
9 (counted from 0). It gives what MONAI's `UNETR` gives with the same weights.

Deviation: patches of any shape. UNETR has four upsampling steps of two because its patches are 16 cubed; here the steps
are the prime factors of the patch, and there are as many hidden states as there are steps in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetResBlock, UnetrUpBlock
from torch import Tensor, nn

from medmim.heads.scores import expect_background
from medmim.layers.tokens import Size
from medmim.layers.upsampling import upsampling_strides

CONV = {"kernel_size": 3, "norm_name": "instance"}


class UNETRDecoder(nn.Module):
    """Merges projected hidden states and the volume itself into the upsampled output of a transformer.

    Args:
        encoder: One whose maps all have one resolution, such as a ViT.
        num_classes: K, the background included.
        feature_size: Channels at full resolution; doubles with each step towards the encoder.

    Raises:
        ValueError: For an encoder with a pyramid of maps, or patches of one voxel.
    """

    norm_taps = False

    def __init__(self, encoder: nn.Module, *, num_classes: int, feature_size: int = 16) -> None:
        super().__init__()
        reductions = {info["reduction"] for info in encoder.feature_info}
        if len(reductions) > 1:
            raise ValueError("it takes hidden states of one resolution, and this encoder has a pyramid; use unet")
        strides = upsampling_strides(*reductions)
        if not strides:
            raise ValueError("it upsamples patches, and those of this encoder are single voxels; use linear")
        steps, depth = len(strides), len(encoder.feature_info)
        self.taps = tuple(depth * step // steps for step in range(1, steps))
        widths = [feature_size * 2**i for i in reversed(range(steps))]

        self.volume = UnetrBasicBlock(3, encoder.in_chans, feature_size, stride=1, res_block=True, **CONV)
        # From the deepest hidden state to the shallowest: each needs one step more to get where it is merged.
        self.projections = nn.ModuleList(
            Projection(encoder.num_features, width, strides[: step + 1]) for step, width in enumerate(widths[:-1])
        )
        self.merges = nn.ModuleList(
            UnetrUpBlock(3, below, width, upsample_kernel_size=stride, res_block=True, **CONV)
            for below, width, stride in zip((encoder.num_features, *widths), widths, strides, strict=False)
        )
        self.to_classes = UnetOutBlock(3, feature_size, num_classes)
        expect_background(self.to_classes.conv.conv)

    def forward(self, x: Tensor, maps: list[Tensor]) -> Tensor:
        """Scores (B, K, D, H, W) from the volume (B, in_chans, D, H, W), hidden states and output (B, C, d, h, w)."""
        *hidden, y = maps
        skips = [project(state) for project, state in zip(self.projections, reversed(hidden), strict=True)]
        for merge, skip in zip(self.merges, itertools.chain(skips, [self.volume(x)]), strict=True):
            y = merge(y, skip)
        return self.to_classes(y)


class Projection(nn.Sequential):
    """A hidden state (B, C, d, h, w) brought to a finer grid: transposed convolutions, residual blocks between them.

    Args:
        in_chans: C.
        width: Channels from the first step on.
        strides: Of the steps.
    """

    def __init__(self, in_chans: int, width: int, strides: Sequence[Size]) -> None:
        first, *rest = strides
        super().__init__(nn.ConvTranspose3d(in_chans, width, kernel_size=first, stride=first, bias=False))
        for stride in rest:
            self.append(nn.ConvTranspose3d(width, width, kernel_size=stride, stride=stride, bias=False))
            self.append(UnetResBlock(3, width, width, stride=1, **CONV))
