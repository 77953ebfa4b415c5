"""The residual encoder U-Net of dynamic-network-architectures, for comparison, and a plan small enough for tests."""

from __future__ import annotations

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

# A stage that widens and strides, one that only strides (anisotropic), one that only widens.
TINY = {"strides": (1, 2, (1, 2, 2), 1), "channels": (4, 8, 8, 12), "depths": (1, 2, 1, 2), "img_size": (8, 24, 16)}


def reference(channels, depths, strides, *, in_chans=1, **_) -> ResidualEncoderUNet:
    """The peer's network, with the settings that nnU-Net's planner gives it."""
    return ResidualEncoderUNet(
        in_chans,
        len(channels),
        channels,
        nn.Conv3d,
        3,
        strides,
        depths,
        num_classes=3,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def randomise(module: nn.Module) -> nn.Module:
    """Gives every parameter random values: norms around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = noise + 1.0 if "norm.weight" in name or "all_modules.1.weight" in name else noise
    return module
