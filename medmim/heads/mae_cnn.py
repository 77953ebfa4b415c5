"""The decoder of a masked autoencoder whose encoder is convolutional: a U-Net's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from medmim.heads.unet import UNetDecoder
from medmim.layers.tokens import Size, gather_patches, hidden_voxels, to_grid_size


class MAECNNDecoder(UNetDecoder):
    """Predicts blocks of which the encoder saw zeros, since a convolution cannot skip them (Wald et al. 2025).

    Args:
        channels: See `UNetDecoder`.
        reductions: See `UNetDecoder`.
        unit: Voxels along (D, H, W) that are hidden together.
        in_chans: Channels of the volume.

    Raises:
        ValueError: For reductions that do not divide.
    """

    def __init__(
        self,
        channels: Sequence[int],
        reductions: Sequence[Size],
        *,
        unit: Size = (16, 16, 16),
        in_chans: int = 1,
    ) -> None:
        super().__init__(channels, reductions, out_channels=in_chans)
        self.unit = tuple(unit)

    @staticmethod
    def of_encoder(encoder: nn.Module) -> dict[str, Any]:
        """The arguments that a pyramid encoder decides."""
        return {
            "channels": tuple(level["num_chs"] for level in encoder.feature_info),
            "reductions": tuple(tuple(level["reduction"]) for level in encoder.feature_info),
            "in_chans": encoder.in_chans,
        }

    def predict(self, encoder: nn.Module, x: Tensor, idx_keep: Tensor, idx_hidden: Tensor) -> Tensor:
        """Voxels (B, M, V) of the hidden blocks of volumes (B, C, D, H, W); `idx_keep` are all others."""
        shown = x.masked_fill(hidden_voxels(idx_hidden, self.unit, to_grid_size(x.shape[2:], self.unit)), 0)
        volume = self(encoder.forward_intermediates(shown, intermediates_only=True))  # (B, in_chans, D, H, W)
        return gather_patches(volume, idx_hidden, self.unit)
