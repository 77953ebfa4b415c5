"""MAE3D: the masked autoencoder on volumes (He et al. 2022; for volumes Chen et al. 2023, arXiv 2204.11716).

Three quarters of the patches are hidden; the encoder sees the others alone; a light decoder predicts the hidden ones.
Deviation from the released code of the second paper: the encoder's final norm is part of the encoder here, so it is
trained; there it is skipped in pretraining and used, untrained, afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from medmim.spec import PartSpec
from medmim_training.methods.masked import MaskedModelling


class MAE(MaskedModelling):
    """Predicts hidden patches from visible ones.

    Args:
        encoder: A token encoder with `forward_visible`.
        ratio: Share of the tokens to hide, exactly `int(ratio * N)` of each sample.
        hiding: Other arguments of `Hiding`, such as {"rule": "block"}.
        target: "voxels" (raw, as Chen et al.) or "normalised" per patch (as He et al.; the encoder is published alone).
        loss: "l1" (as Chen et al.) or "mse" (as He et al.), mean over the voxels of hidden patches.
        decoder: Arguments of `MAEDecoder`: embed_dim, depth, num_heads.

    Raises:
        ValueError: For an unknown choice.
    """

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
        args = {
            "patch_size": list(encoder.patch_size),
            "in_chans": encoder.in_chans,
            "prefix_tokens": encoder.num_prefix_tokens,
            **(decoder or {}),
        }
        super().__init__(
            encoder,
            PartSpec(kind="mae", args=args),
            ratio=ratio,
            hiding=hiding,
            target=target,
            loss=loss,
        )
