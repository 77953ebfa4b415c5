"""The decoder of SimMIM: the token that replaces what is hidden, and one linear layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from medmim.layers.tokens import Size, gather_patches, hidden_voxels, to_grid_size, unpatchify


class SimMIMDecoder(nn.Module):
    """Predicts from each place of the encoder's output the voxels it stands for (Xie et al. 2022).

    On a map of tokens that is their head for Swin transformers, a convolution of 1 and a shuffle of its channels into
    voxels.

    Args:
        encoder_dim: Channels of the encoder's output.
        token_dim: Channels of its patch embedding, and so of the token.
        patch_size: Voxels along (D, H, W) that it embeds together.
        stride: Voxels along (D, H, W) to one place of its output.
        unit: Voxels along (D, H, W) that are hidden together, a multiple of the patch; None for one patch.
        in_chans: Channels of the volume.
        prefix_tokens: Class and register tokens in front of the encoder's output, which predict nothing.

    Raises:
        ValueError: For a unit that is no multiple of the patch.
    """

    def __init__(
        self,
        encoder_dim: int,
        *,
        token_dim: int,
        patch_size: Size,
        stride: Size,
        unit: Size | None = None,
        in_chans: int = 1,
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.unit, self.stride, self.prefix_tokens = tuple(unit or patch_size), tuple(stride), prefix_tokens
        self.patches_per_unit = to_grid_size(self.unit, patch_size)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, token_dim))
        self.to_voxels = nn.Linear(encoder_dim, in_chans * math.prod(self.stride))
        nn.init.normal_(self.hidden_token, std=0.02)
        nn.init.xavier_uniform_(self.to_voxels.weight)
        nn.init.zeros_(self.to_voxels.bias)

    @staticmethod
    def of_encoder(encoder: nn.Module) -> dict[str, Any]:
        """The arguments that an encoder with `forward_replaced` decides."""
        return {
            "encoder_dim": encoder.num_features,
            "token_dim": encoder.embed_dim,
            "patch_size": encoder.patch_size,
            "stride": tuple(encoder.feature_info[-1]["reduction"]),
            "in_chans": encoder.in_chans,
            "prefix_tokens": encoder.num_prefix_tokens,
        }

    def forward(self, features: Tensor, size: Size) -> Tensor:
        """Volumes (B, in_chans, D, H, W) of this (D, H, W) from what the encoder gave for them, tokens or a map."""
        if features.ndim == 5:  # (B, C, d, h, w) of a pyramid encoder
            features = features.flatten(2).mT
        voxels = self.to_voxels(features[:, self.prefix_tokens :])  # (B, n, in_chans * stride voxels)
        return unpatchify(voxels, self.stride, to_grid_size(size, self.stride))

    def predict(self, encoder: nn.Module, x: Tensor, idx_keep: Tensor, idx_hidden: Tensor) -> Tensor:
        """Voxels (B, M, V) of the hidden units of volumes (B, C, D, H, W), at whose places the encoder sees the token.

        The others, `idx_keep`, are all the rest.
        """
        size = tuple(x.shape[2:])
        # Of the patches as if each were a voxel.
        hidden = hidden_voxels(idx_hidden, self.patches_per_unit, to_grid_size(size, self.unit))[:, 0]
        features = encoder.forward_replaced(x, hidden, self.hidden_token)
        return gather_patches(self(features, size), idx_hidden, self.unit)
