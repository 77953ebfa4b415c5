"""MAE on a convolutional encoder: blocks of the input are filled with zeros, a U-Net predicts them.

The strongest simple baseline of the OpenMind benchmark (Wald et al. 2025, arXiv 2412.17041), there with 16-voxel
blocks, three quarters hidden, and L2 on hidden voxels. A convolution cannot skip what is hidden, so the encoder does
see zeros where the sparse variants (SparK, S3D) see nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from medmim.heads.unet import UNetDecoder
from medmim.layers.tokens import gather_patches, hidden_voxels, to_grid_size
from medmim.reconstruction import Reconstruction
from medmim_training.methods.base import MethodOutput, inside_scan, named_choice, paste
from medmim_training.methods.draws import Generators
from medmim_training.methods.hiding import Hiding
from medmim_training.methods.losses import LOSSES, hidden_loss
from medmim_training.store.views import OneCrop


class MAECNN(nn.Module):
    """Predicts hidden blocks from the others with a U-Net whose encoder is what is trained for.

    Args:
        encoder: A pyramid encoder: its `forward_intermediates` gives maps from fine to coarse.
        ratio: Share of the blocks to hide, exactly `int(ratio * N)` of each sample.
        hiding: Other arguments of `Hiding`, such as {"rule": "block"}.
        unit: Voxels of a block along (D, H, W).
        loss: "mse" (as OpenMind) or "l1", mean over hidden voxels.

    Raises:
        ValueError: For an unknown choice, or a block that does not divide the input.
    """

    views = OneCrop()
    decoder_spec = None

    def __init__(
        self,
        encoder: nn.Module,
        *,
        ratio: float = 0.75,
        hiding: Mapping[str, Any] | None = None,
        unit: Sequence[int] = (16, 16, 16),
        loss: Literal["l1", "mse"] = "mse",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.hiding = Hiding(ratio=ratio, **(hiding or {}))
        self.unit = tuple(unit)
        self.unit_grid = to_grid_size(encoder.img_size, self.unit)
        self.loss = named_choice("loss", loss, LOSSES)
        levels = encoder.feature_info
        self.decoder = UNetDecoder(
            [level["num_chs"] for level in levels],
            [level["reduction"] for level in levels],
            out_channels=encoder.in_chans,
        )

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def forward(self, batch: Mapping[str, Tensor], generator: Generators = None) -> MethodOutput:
        """The loss of one batch.

        Args:
            batch: "x": volumes (B, V, in_chans, D, H, W) in network units; "inside", as `CropDataset` makes it, leaves
                what lies outside of a scan out of the loss.
            generator: On the CPU, one for the batch or one a sample; decides what is hidden.
        """
        x = batch["x"].flatten(0, 1)  # (B, C, D, H, W)
        _, idx_hidden = self.hiding(x, self.unit, generator=generator)
        shown = x.masked_fill(hidden_voxels(idx_hidden, self.unit, self.unit_grid), 0)
        volume = self.decoder(self.encoder.forward_intermediates(shown, intermediates_only=True))  # (B, C, D, H, W)
        predicted = gather_patches(volume, idx_hidden, self.unit).float()  # (B, M, V)
        target = gather_patches(x, idx_hidden, self.unit)
        loss = hidden_loss(self.loss, predicted, target, inside_scan(batch, idx_hidden, self.unit))

        def picture() -> Reconstruction:
            return paste(x, predicted, idx_hidden, self.unit)

        return MethodOutput(loss, picture=picture)
