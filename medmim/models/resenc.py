"""The residual encoder of nnU-Net: a stem, then stages of residual blocks, read top to bottom.

Legend: B batch, C channels, (D, H, W) voxels, (d, h, w) the map of a stage: (D, H, W) over the strides so far.

After Isensee et al. 2024 (nnU-Net Revisited, arXiv 2404.09556); blocks of He et al. 2019 (ResNet-D, arXiv 1812.01187).
It gives what the `ResidualEncoder` of the package dynamic-network-architectures gives with the same weights, which
`medmim.convert` translates: kernels of 3, no dropout, no stochastic depth, no norm after the last stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medmim.layers.adapt import adapt_in_chans
from medmim.layers.classifier import MapClassifier
from medmim.layers.convolution import ConvNorm, init_convolutional, leaky_relu_
from medmim.layers.features import FeatureMaps
from medmim.layers.sharing import Shareable
from medmim.layers.tokens import Size, to_grid_size, to_size


class AvgPool3d(nn.AvgPool3d):
    """torch's, for models in half precision on a CPU as well, for which it has none; autocast has fp32 here."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype.itemsize > 2 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return super().forward(x.float()).to(x.dtype)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut: maps (B, in_chans, D, H, W) to (B, out_chans, D, H, W) over the stride.

    The shortcut averages where the block strides and projects where it changes channels.
    """

    def __init__(self, in_chans: int, out_chans: int, *, stride: Size = (1, 1, 1)) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, out_chans, stride=stride, activated=True)
        self.conv2 = ConvNorm(out_chans, out_chans)
        self.shortcut = nn.Sequential()
        if stride != (1, 1, 1):
            self.shortcut.append(AvgPool3d(stride))
        if in_chans != out_chans:
            self.shortcut.append(ConvNorm(in_chans, out_chans, kernel_size=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(self.conv1(x))
        branch += self.shortcut(x)
        return leaky_relu_(branch)


class ResidualEncoder3D(FeatureMaps, MapClassifier, Shareable, nn.Module):
    """A convolutional encoder for volumes (B, in_chans, D, H, W) of any proportions, with a feature pyramid.

    Args:
        img_size: Voxels along (D, H, W); each a multiple of the product of the strides.
        strides: Of each stage: one number, or three along (D, H, W). The first is 1 for a pyramid from full resolution.
        in_chans: Channels of the input.
        num_classes: Outputs of the classifier; 0 for none, `forward` then gives pooled features.
        global_pool: "avg", over the last stage's map.
        channels: Width of each stage; the stem has that of the first.
        depths: Blocks of each stage.

    Raises:
        ValueError: For stages that do not match, or an input that the strides do not divide or reduce to one voxel.
    """

    maps_are = "stages"

    def __init__(
        self,
        img_size: Size = (96, 96, 96),
        strides: Sequence[int | Size] = (1, 2, 2, 2, 2, 2),
        *,
        in_chans: int = 1,
        num_classes: int = 0,
        global_pool: Literal["avg"] = "avg",
        channels: Sequence[int] = (32, 64, 128, 256, 320, 320),
        depths: Sequence[int] = (1, 3, 4, 6, 6, 6),
    ) -> None:
        super().__init__()
        if not 0 < len(channels) == len(depths) == len(strides):
            raise ValueError(
                f"{len(channels)} channels, {len(depths)} depths and {len(strides)} strides; give one of each a stage"
            )
        self.spec = None  # set by whoever knows where the weights came from
        self.channels = tuple(channels)
        self.strides = tuple((side,) * 3 if isinstance(side, int) else tuple(side) for side in strides)
        if min(*channels, *depths, *sum(self.strides, ())) < 1:
            raise ValueError(f"channels {channels}, depths {depths} and strides {strides} must all be at least 1")
        self.in_chans = in_chans
        self.num_prefix_tokens = 0
        self.grad_checkpointing = False
        self.set_input_size(img_size)

        self.stem = ConvNorm(in_chans, channels[0], activated=True)
        self.stages = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(below, width, stride=stride),
                *(ResidualBlock(width, width) for _ in range(depth - 1)),
            )
            for below, width, depth, stride in zip(
                (channels[0], *channels), self.channels, depths, self.strides, strict=False
            )
        )
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    # --- construction -------------------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Initialises every parameter (see `init_convolutional`); the branch of each block starts at zero."""
        self.apply(init_convolutional)
        for stage in self.stages:
            for block in stage:
                nn.init.zeros_(block.conv2.norm.weight)
        self.init_head()

    def init_buffers(self) -> None:
        """Rebuilds what no file stores: nothing here."""

    @property
    def patch_size(self) -> Size:
        """Voxels along (D, H, W) of one position of the last map: the product of the strides."""
        return self.feature_info[-1]["reduction"]

    @property
    def num_features(self) -> int:
        """Channels of the last map."""
        return self.channels[-1]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """What each stage gives: its module, channels and stride in voxels along (D, H, W)."""
        return [
            {"module": f"stages.{i}", "num_chs": width, "reduction": _product(self.strides[: i + 1])}
            for i, width in enumerate(self.channels)
        ]

    def set_input_size(self, img_size: Size | int | None = None, patch_size: Size | int | None = None) -> None:
        """Changes the input size; no weight depends on it.

        Args:
            img_size: Voxels along (D, H, W); one number for a cube.
            patch_size: For the contract of encoders; only the product of the strides is possible.

        Raises:
            ValueError: For no size, one that the strides do not divide or reduce to one voxel, or another patch size.
        """
        if patch_size is not None and to_size(patch_size, "patch_size") != self.patch_size:
            raise ValueError(f"patch_size cannot be {patch_size}: the strides make it {self.patch_size}")
        img_size = to_size(self.img_size if img_size is None else img_size, "img_size")
        grid_size = to_grid_size(img_size, self.patch_size)
        if math.prod(grid_size) == 1:
            raise ValueError(
                f"img_size {img_size} leaves one voxel to the last stage, where instance norm needs several; "
                f"use more than patch_size {self.patch_size}"
            )
        self.img_size, self.grid_size = img_size, grid_size

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades a second forward pass through each block for the memory of its activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, as timm's layer-wise decay wants them."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone, beyond those with one axis: none."""
        return set()

    # --- forward ------------------------------------------------------------------------------------------------------

    def _embed(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return self.stem(x)  # (B, C, D, H, W)

    def _run_stage(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        for block in stage:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def _steps(self) -> list[Callable[[Tensor], Tensor]]:
        return [partial(self._run_stage, stage) for stage in self.stages]

    def _finish(self, x: Tensor) -> Tensor:
        return x  # there is no final norm

    def _as_output(self, x: Tensor, output_fmt: str, *, norm: bool) -> tuple[Tensor, Tensor]:
        prefix = x.new_zeros(x.shape[0], 0, x.shape[1])
        return x if output_fmt == "NCDHW" else x.flatten(2).transpose(1, 2), prefix  # (B, d*h*w, C)

    def forward_features(self, x: Tensor) -> Tensor:
        """Volumes (B, in_chans, D, H, W) to the last stage's map (B, C, d, h, w)."""
        return self._encode(self._embed(x))

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last of `indices`, and the head on request; returns the indices.

        `patch_size`, `grid_size` and `num_features` become those of the last stage that stays.
        """
        wanted = self._chosen(indices)
        kept = max(wanted) + 1
        self.stages, self.channels, self.strides = self.stages[:kept], self.channels[:kept], self.strides[:kept]
        self.set_input_size()
        if prune_head:
            self.reset_classifier(0)
        return wanted


def _product(strides: Sequence[Size]) -> Size:
    depth, height, width = (math.prod(sides) for sides in zip(*strides, strict=True))
    return depth, height, width


# --- fitting a checkpoint to a model of another shape -----------------------------------------------------------------


def adapt_state_dict(state: Mapping[str, Tensor], model: ResidualEncoder3D, source: Mapping[str, Any]) -> dict:
    """Fits the weights of one residual encoder to another number of channels; other input sizes need no change.

    Args:
        state: Weights as saved.
        model: The model they are for; only its sizes are read, it may be on the meta device.
        source: Constructor arguments of the model that was saved; not needed here.

    Returns:
        A new state dict; tensors that fit already are passed on as they are.
    """
    adapted = dict(state)
    if (weight := state.get("stem.conv.weight")) is not None:
        adapted["stem.conv.weight"] = adapt_in_chans(weight, model.in_chans)
    return adapted
