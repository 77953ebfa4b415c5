"""Where the class scores of a new segmentation decoder start."""

from __future__ import annotations

import math

import torch
from torch import nn

FOREGROUND = 0.01  # the share that Lin et al. 2017 start with


@torch.no_grad()
def expect_background(layer: nn.Conv3d) -> None:
    """Sets the bias of the layer that gives class scores so that a new decoder takes nearly all voxels for background.

    Most organs and lesions fill a few percent of a volume or less. A decoder that begins with all classes alike spends
    its first steps on this share alone, by scaling its features down, and may then stay at background everywhere
    (Lin et al. 2017, arXiv 1708.02002, section 3.3; there for one-stage detectors).

    Args:
        layer: With an output channel a class, the background first.
    """
    others = layer.out_channels - 1
    if others:
        layer.bias.fill_(math.log(FOREGROUND / others))
        layer.bias[0] = math.log(1 - FOREGROUND)
