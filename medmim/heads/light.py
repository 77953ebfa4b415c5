"""A light decoder: transposed convolutions from the last map to voxels, no skips."""

from __future__ import annotations

from torch import Tensor, nn

from medmim.heads.scores import expect_background
from medmim.layers.convolution import init_convolutional
from medmim.layers.upsampling import upsampling_strides


class LightDecoder(nn.Module):
    """Upsamples the last map step by step, at half the width each time (as the "PUP" of SETR, Zheng et al. 2021).

    Args:
        encoder: Any encoder.
        num_classes: K, the background included.
        width: Channels at full resolution; doubles with each step towards the encoder.
    """

    taps: tuple[int, ...] = ()
    norm_taps = False

    def __init__(self, encoder: nn.Module, *, num_classes: int, width: int = 16) -> None:
        super().__init__()
        strides = upsampling_strides(encoder.feature_info[-1]["reduction"])
        widths = [width * 2**i for i in reversed(range(len(strides)))]
        steps = []
        for below, above, stride in zip((encoder.num_features, *widths), widths, strides, strict=False):
            steps += [
                nn.ConvTranspose3d(below, above, kernel_size=stride, stride=stride),
                nn.InstanceNorm3d(above, affine=True),
                nn.LeakyReLU(0.01, inplace=True),
            ]
        self.steps = nn.Sequential(*steps)
        self.to_classes = nn.Conv3d(widths[-1] if widths else encoder.num_features, num_classes, kernel_size=1)
        self.apply(init_convolutional)
        expect_background(self.to_classes)

    def forward(self, x: Tensor, maps: list[Tensor]) -> Tensor:
        """Scores (B, K, D, H, W) from the last map (B, C, d, h, w); of the volume `x` only the size is used."""
        d, h, w = x.shape[2:]
        # A map whose size was rounded up reaches past the volume.
        return self.to_classes(self.steps(maps[-1]))[:, :, :d, :h, :w]
