"""The decoder of a masked autoencoder: from visible tokens to the voxels of the hidden patches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from medmim.layers.position import Place, sincos_position
from medmim.layers.tokens import Size, gather_tokens, scatter_tokens
from medmim.layers.transformer import Block, init_transformer


class MAEDecoder(nn.Module):
    """A light transformer over all tokens, hidden ones replaced by a learned token (He et al. 2022, section 3).

    Only hidden patches are projected to voxels: nothing else is ever asked of it.

    Args:
        encoder_dim: Channels of the encoder's tokens.
        grid_size: Tokens along (D, H, W).
        patch_size: Voxels of a patch along (D, H, W).
        in_chans: Channels of the volume.
        prefix_tokens: Class and register tokens in front of the encoder's output; the decoder attends to them.
        first_place: Where the first token is (see `sincos_position`).
        embed_dim: Width.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over `embed_dim`.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid_size: Size,
        *,
        patch_size: Size,
        in_chans: int = 1,
        prefix_tokens: int = 0,
        first_place: Place = (0.0, 0.0, 0.0),
        embed_dim: int = 384,
        depth: int = 4,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.unit = tuple(patch_size)
        self.prefix_tokens = prefix_tokens
        self.embed = nn.Linear(encoder_dim, embed_dim)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.to_voxels = nn.Linear(embed_dim, in_chans * math.prod(patch_size))
        self.grid_size, self.first_place = tuple(grid_size), first_place
        self.init_buffers()
        self.apply(init_transformer)
        nn.init.normal_(self.hidden_token, std=0.02)

    @staticmethod
    def of_encoder(encoder: nn.Module) -> dict[str, Any]:
        """The arguments that a token encoder decides."""
        return {
            "encoder_dim": encoder.num_features,
            "grid_size": encoder.grid_size,
            "patch_size": encoder.patch_size,
            "in_chans": encoder.in_chans,
            "prefix_tokens": encoder.num_prefix_tokens,
            "first_place": encoder.first_place,
        }

    def init_buffers(self) -> None:
        """Rebuilds what no file stores: the fixed positions."""
        position = sincos_position(self.grid_size, self.embed.out_features, self.first_place)
        self.register_buffer("pos_embed", position.to(self.hidden_token), persistent=False)

    def forward(self, tokens: Tensor, idx_keep: Tensor, idx_hidden: Tensor) -> Tensor:
        """Predicts the hidden patches.

        Args:
            tokens: Encoder output for the visible tokens, (B, prefix + K, encoder_dim).
            idx_keep: Which tokens they are, (B, K).
            idx_hidden: Which tokens to predict, (B, M).

        Returns:
            Voxels (B, M, V), in the order of `medmim.layers.tokens.patchify`.
        """
        x = self.embed(tokens)  # (B, prefix + K, C)
        prefix, visible = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        grid = self.hidden_token.to(x.dtype).expand(x.shape[0], self.pos_embed.shape[1], -1)  # (B, N, C)
        grid = scatter_tokens(grid, idx_keep, visible) + self.pos_embed
        x = torch.cat([prefix.to(grid.dtype), grid], dim=1)  # (B, prefix + N, C)
        for block in self.blocks:
            x = block(x)
        return self.to_voxels(self.norm(gather_tokens(x[:, self.prefix_tokens :], idx_hidden)))

    def predict(self, encoder: nn.Module, x: Tensor, idx_keep: Tensor, idx_hidden: Tensor) -> Tensor:
        """Voxels (B, M, V) of the hidden patches of volumes (B, C, D, H, W), of which the encoder sees the others."""
        return self(encoder.forward_visible(x, idx_keep), idx_keep, idx_hidden)
