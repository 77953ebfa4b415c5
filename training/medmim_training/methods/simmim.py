"""SimMIM3D: hidden patches become a learned token, and one linear layer predicts them.

After Xie et al. 2022, for volumes Chen et al. 2023 (arXiv 2204.11716).
Deviation from the released code of the second paper: the encoder's final norm is trained, and the token starts at
N(0, 0.02) as the positions do (there at N(0, 1), fifty times their size).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medmim.layers.tokens import gather_patches, to_grid_size, unpatchify
from medmim.reconstruction import Reconstruction
from medmim_training.methods.base import MethodOutput, inside_scan, named_choice, paste
from medmim_training.methods.draws import Generators
from medmim_training.methods.hiding import Hiding
from medmim_training.methods.losses import LOSSES, hidden_loss
from medmim_training.methods.targets import TARGETS
from medmim_training.store.views import OneCrop


class SimMIM(nn.Module):
    """Predicts hidden patches from all positions, at each position by a linear layer.

    Works with any encoder that has `forward_replaced`: a ViT, whose every token predicts its own patch, or a Swin
    transformer, whose every last-stage token predicts the voxels it stands for. On a map of tokens that layer is the
    head of Xie et al. for Swin transformers, a convolution of 1 and a shuffle of its channels into voxels.

    Args:
        encoder: The encoder.
        ratio: Share of the units to hide, exactly `int(ratio * N)` of each sample.
        hiding: Other arguments of `Hiding`, such as {"rule": "block"}.
        unit: Voxels along (D, H, W) that are hidden together, a multiple of the encoder's patch; None for one patch.
        target: "voxels" or "normalised" per unit.
        loss: "l1" or "mse", mean over hidden voxels.

    Raises:
        ValueError: For an unknown choice, or a unit that does not fit.
    """

    views = OneCrop()
    decoder_spec = None

    def __init__(
        self,
        encoder: nn.Module,
        *,
        ratio: float = 0.75,
        hiding: Mapping[str, Any] | None = None,
        unit: Sequence[int] | None = None,
        target: Literal["voxels", "normalised"] = "voxels",
        loss: Literal["l1", "mse"] = "l1",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.hiding = Hiding(ratio=ratio, **(hiding or {}))
        self.unit = tuple(unit or encoder.patch_size)
        self.unit_grid = to_grid_size(encoder.img_size, self.unit)
        self.patches_per_unit = to_grid_size(self.unit, encoder.patch_size)
        self.target = named_choice("target", target, TARGETS)
        self.loss = named_choice("loss", loss, LOSSES)
        self.stride = tuple(encoder.feature_info[-1]["reduction"])
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        self.to_voxels = nn.Linear(encoder.num_features, encoder.in_chans * math.prod(self.stride))
        nn.init.normal_(self.hidden_token, std=0.02)
        nn.init.xavier_uniform_(self.to_voxels.weight)
        nn.init.zeros_(self.to_voxels.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()} | {"hidden_token"}

    def forward(self, batch: Mapping[str, Tensor], generator: Generators = None) -> MethodOutput:
        """The loss of one batch.

        Args:
            batch: "x": volumes (B, V, in_chans, D, H, W) in network units; "inside", as `CropDataset` makes it, leaves
                what lies outside of a scan out of the loss.
            generator: On the CPU, one for the batch or one a sample; decides what is hidden.
        """
        x = batch["x"].flatten(0, 1)  # (B, C, D, H, W)
        _, idx_hidden = self.hiding(x, self.unit, generator=generator)
        hidden = self._hidden_patches(idx_hidden)
        features = self.encoder.forward_replaced(x, hidden, self.hidden_token)
        predicted = gather_patches(self._predict(features), idx_hidden, self.unit).float()  # (B, M, V)
        target = self.target(gather_patches(x, idx_hidden, self.unit))
        loss = hidden_loss(self.loss, predicted, target, inside_scan(batch, idx_hidden, self.unit))

        def picture() -> Reconstruction:
            return paste(x, predicted, idx_hidden, self.unit)

        return MethodOutput(loss, picture=picture)

    def _predict(self, features: Tensor) -> Tensor:
        """Volumes (B, in_chans, D, H, W) from what the encoder gave for them."""
        if features.ndim == 5:  # (B, C, d, h, w) of a pyramid encoder
            features = features.flatten(2).mT
        voxels = self.to_voxels(features[:, self.encoder.num_prefix_tokens :])  # (B, n, C * stride voxels)
        return unpatchify(voxels, self.stride, to_grid_size(self.encoder.img_size, self.stride))

    def _hidden_patches(self, idx_hidden: Tensor) -> Tensor:
        """Boolean (B, Dg, Hg, Wg) on the encoder's patch grid, True inside of hidden units."""
        units = torch.zeros(len(idx_hidden), math.prod(self.unit_grid), dtype=torch.bool, device=idx_hidden.device)
        hidden = units.scatter(1, idx_hidden, True).view(-1, *self.unit_grid)
        for axis, times in enumerate(self.patches_per_unit, start=1):
            hidden = hidden.repeat_interleave(times, dim=axis)
        return hidden
