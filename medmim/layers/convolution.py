"""Convolution, instance norm and leaky ReLU: what nnU-Net is made of, shared by its encoder and its decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmim.layers.tokens import Size

NEGATIVE_SLOPE = 0.01


def leaky_relu_(x: Tensor) -> Tensor:
    """The activation, in place: at full resolution every copy of a feature map counts."""
    return F.leaky_relu(x, NEGATIVE_SLOPE, inplace=True)


class Conv3d(nn.Conv3d):
    """torch's, with right gradients on a CPU in bf16 as well.

    There the gradient of the kernel is wrong, at times infinite, where a map has more than one slice but fewer than the
    kernel (oneDNN in torch 2.14, 16 channels or more): that of 64-cubed crops at stride 32 has two. Such a map is
    small, so its convolution is computed in fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype == torch.float64 or not 1 < x.shape[2] < self.kernel_size[0]:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)


class ConvNorm(nn.Module):
    """A convolution and an instance norm (Ulyanov et al. 2016) over maps (B, C, D, H, W).

    Args:
        in_chans: Channels of the input.
        out_chans: Channels of the output.
        kernel_size: Odd side of the kernel; the border is padded with zeros, so that stride 1 keeps the size.
        stride: Along (D, H, W).
        bias: Whether the convolution has one. The norm undoes it; it is there because nnU-Net's weights have it.
        activated: Whether the activation follows. It is part of the module, for what is done in place to the output of
            a module fails where weights are split over processes (FSDP2).
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        *,
        kernel_size: int = 3,
        stride: Size = (1, 1, 1),
        bias: bool = True,
        activated: bool = False,
    ) -> None:
        super().__init__()
        self.activated = activated
        self.conv = Conv3d(in_chans, out_chans, kernel_size, stride, padding=kernel_size // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(out_chans, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return leaky_relu_(x) if self.activated else x


def init_convolutional(module: nn.Module) -> None:
    """Initialises one module as nnU-Net does: He-normal kernels (He et al. 2015), zero biases, unit norms.

    For use with `nn.Module.apply`; modules without parameters of their own are left alone.
    """
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.InstanceNorm3d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
