"""MAE3D: the masked autoencoder on volumes (He et al. 2022; for volumes Chen et al. 2023, arXiv 2204.11716).

Three quarters of the patches are hidden; the encoder sees the others alone; a light decoder predicts the hidden ones.
Deviation from the released code of the second paper: the encoder's final norm is part of the encoder here, so it is
trained; there it is skipped in pretraining and used, untrained, afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from medmim.heads.mae import MAEDecoder
from medmim.layers.tokens import gather_patches
from medmim.reconstruction import Reconstruction
from medmim.spec import PartSpec
from medmim_training.methods.base import MethodOutput, inside_scan, named_choice, paste
from medmim_training.methods.draws import Generators
from medmim_training.methods.hiding import Hiding
from medmim_training.methods.losses import LOSSES, hidden_loss
from medmim_training.methods.targets import TARGETS
from medmim_training.store.views import OneCrop


class MAE(nn.Module):
    """Predicts hidden patches from visible ones.

    Args:
        encoder: A token encoder with `forward_visible`.
        ratio: Share of the tokens to hide, exactly `int(ratio * N)` of each sample.
        hiding: Other arguments of `Hiding`, such as {"rule": "block"}.
        target: "voxels" (raw, as Chen et al.) or "normalised" per patch (as He et al.).
        loss: "l1" (as Chen et al.) or "mse" (as He et al.), mean over the voxels of hidden patches.
        decoder: Arguments of `MAEDecoder`: embed_dim, depth, num_heads.

    Raises:
        ValueError: For an unknown choice.
    """

    views = OneCrop()

    def __init__(
        self,
        encoder: nn.Module,
        *,
        ratio: float = 0.75,
        hiding: Mapping[str, Any] | None = None,
        target: Literal["voxels", "normalised"] = "voxels",
        loss: Literal["l1", "mse"] = "l1",
        decoder: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.hiding = Hiding(ratio=ratio, **(hiding or {}))
        self.target = named_choice("target", target, TARGETS)
        self.loss = named_choice("loss", loss, LOSSES)
        args = {
            "patch_size": list(encoder.patch_size),
            "in_chans": encoder.in_chans,
            "prefix_tokens": encoder.num_prefix_tokens,
            **(decoder or {}),
        }
        self.decoder = MAEDecoder(encoder.num_features, encoder.grid_size, **args)
        self.decoder_spec = PartSpec(kind="mae", args=args)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()} | {"decoder.hidden_token"}

    def forward(self, batch: Mapping[str, Tensor], generator: Generators = None) -> MethodOutput:
        """The loss of one batch.

        Args:
            batch: "x": volumes (B, V, in_chans, D, H, W) in network units; "inside", as `CropDataset` makes it, leaves
                what lies outside of a scan out of the loss.
            generator: On the CPU, one for the batch or one a sample; decides what is hidden.
        """
        x = batch["x"].flatten(0, 1)  # (B, C, D, H, W)
        patch_size = self.encoder.patch_size
        idx_keep, idx_hidden = self.hiding(x, patch_size, generator=generator)
        tokens = self.encoder.forward_visible(x, idx_keep)  # (B, P + K, C)
        predicted = self.decoder(tokens, idx_keep, idx_hidden).float()  # (B, M, V)
        target = self.target(gather_patches(x, idx_hidden, patch_size))
        loss = hidden_loss(self.loss, predicted, target, inside_scan(batch, idx_hidden, patch_size))

        def picture() -> Reconstruction:
            return paste(x, predicted, idx_hidden, patch_size)

        return MethodOutput(loss, picture=picture)
