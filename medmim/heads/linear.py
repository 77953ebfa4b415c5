"""The decoder that adds as little as can be: a linear map of each position, upsampled."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from medmim.heads.scores import expect_background


class LinearDecoder(nn.Module):
    """Class scores of each position of the last map, interpolated to voxels: what the features hold, and no more.

    Args:
        encoder: Any encoder.
        num_classes: K, the background included.
    """

    taps: tuple[int, ...] = ()
    norm_taps = False

    def __init__(self, encoder: nn.Module, *, num_classes: int) -> None:
        super().__init__()
        self.reduction = encoder.feature_info[-1]["reduction"]
        self.to_classes = nn.Conv3d(encoder.num_features, num_classes, kernel_size=1)
        nn.init.trunc_normal_(self.to_classes.weight, std=0.02)
        expect_background(self.to_classes)

    def forward(self, x: Tensor, maps: list[Tensor]) -> Tensor:
        """Scores (B, K, D, H, W) from the last map (B, C, d, h, w); of the volume `x` only the size is used."""
        scores = self.to_classes(maps[-1])
        size = [side * stride for side, stride in zip(scores.shape[2:], self.reduction, strict=True)]
        d, h, w = x.shape[2:]
        # A map whose size was rounded up reaches past the volume.
        return F.interpolate(scores, size=size, mode="trilinear")[:, :, :d, :h, :w]
