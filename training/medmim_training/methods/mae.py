"""MAE3D: the masked autoencoder on volumes (He et al. 2022; for volumes Chen et al. 2023, arXiv 2204.11716).

Three quarters of the patches are hidden; the encoder sees the others alone; a light decoder predicts the hidden ones.
Deviation from the released code of the second paper: the encoder's final norm is part of the encoder here, so it is
trained; there it is skipped in pretraining and used, untrained, afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmim.heads.mae import MAEDecoder
from medmim.layers.tokens import gather_patches, hidden_voxels, patchify, random_hiding, scatter_tokens, unpatchify
from medmim.reconstruction import Reconstruction
from medmim_training.methods.base import MethodOutput
from medmim_training.methods.targets import TARGETS

LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss}


class MAE(nn.Module):
    """Predicts hidden patches from visible ones.

    Args:
        encoder: A token encoder with `forward_visible`.
        ratio: Share of the tokens to hide, exactly `int(ratio * N)` of each sample.
        target: "voxels" (raw, as Chen et al.) or "normalised" per patch (as He et al.).
        loss: "l1" (as Chen et al.) or "mse" (as He et al.), mean over the voxels of hidden patches.
        decoder: Arguments of `MAEDecoder`: embed_dim, depth, num_heads.

    Raises:
        ValueError: For an unknown target or loss.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        ratio: float = 0.75,
        target: Literal["voxels", "normalised"] = "voxels",
        loss: Literal["l1", "mse"] = "l1",
        decoder: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for what, value, known in (("target", target, TARGETS), ("loss", loss, LOSSES)):
            if value not in known:
                raise ValueError(f"{what} is {value!r}; it must be one of {', '.join(known)}")
        self.encoder = encoder
        self.ratio = ratio
        self.target = TARGETS[target]
        self.loss = LOSSES[loss]
        self.decoder_args = {
            "patch_size": list(encoder.patch_size),
            "in_chans": encoder.in_chans,
            "prefix_tokens": encoder.num_prefix_tokens,
            **(decoder or {}),
        }
        self.decoder = MAEDecoder(encoder.num_features, encoder.grid_size, **self.decoder_args)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()} | {"decoder.hidden_token"}

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> MethodOutput:
        """The loss of one batch.

        Args:
            batch: "x": volumes (B, in_chans, D, H, W) in network units.
            generator: CPU generator that decides what is hidden.
        """
        x = batch["x"]
        patch_size, grid_size = self.encoder.patch_size, self.encoder.grid_size
        num_tokens = self.decoder.pos_embed.shape[1]
        idx_keep, idx_hidden = random_hiding(len(x), num_tokens, self.ratio, generator=generator)
        idx_keep, idx_hidden = idx_keep.to(x.device), idx_hidden.to(x.device)

        tokens = self.encoder.forward_visible(x, idx_keep)  # (B, P + K, C)
        predicted = self.decoder(tokens, idx_keep, idx_hidden).float()  # (B, M, V)
        loss = self.loss(predicted, self.target(gather_patches(x, idx_hidden, patch_size)))

        def picture() -> Reconstruction:
            first, idx = x[:1].detach(), idx_hidden[:1]
            volume = unpatchify(
                scatter_tokens(patchify(first, patch_size), idx, predicted[:1].detach()), patch_size, grid_size
            )
            hidden = hidden_voxels(idx, patch_size, grid_size)
            return Reconstruction(original=first[0], hidden=hidden[0, 0], prediction=volume[0])

        return MethodOutput(loss, picture=picture)
