"""SimMIM3D: hidden patches become a learned token, and one linear layer predicts them.

After Xie et al. 2022, for volumes Chen et al. 2023 (arXiv 2204.11716).
Deviation from the released code of the second paper: the encoder's final norm is trained, and the token starts at
N(0, 0.02) as the positions do (there at N(0, 1), fifty times their size).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from medmim.spec import PartSpec
from medmim_training.methods.masked import MaskedModelling


class SimMIM(MaskedModelling):
    """Predicts hidden patches from all positions, at each position by a linear layer.

    Works with any encoder that has `forward_replaced`: a ViT, whose every token predicts its own patch, or a Swin
    transformer, whose every last-stage token predicts the voxels it stands for.

    Args:
        encoder: The encoder.
        ratio: Share of the units to hide, exactly `int(ratio * N)` of each sample.
        hiding: Other arguments of `Hiding`, such as {"rule": "block"}.
        unit: Voxels along (D, H, W) that are hidden together, a multiple of the encoder's patch; None for one patch.
        target: "voxels", or "normalised" per unit (then the encoder is published alone).
        loss: "l1" or "mse", mean over hidden voxels.

    Raises:
        ValueError: For an unknown choice, or a unit that does not fit.
    """

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
        args = {"unit": list(unit or encoder.patch_size)}
        super().__init__(
            encoder,
            PartSpec(kind="simmim", args=args),
            ratio=ratio,
            hiding=hiding,
            target=target,
            loss=loss,
        )
