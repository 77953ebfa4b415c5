"""MAE on a convolutional encoder: blocks of the input are filled with zeros, a U-Net predicts them.

The strongest simple baseline of the OpenMind benchmark (Wald et al. 2025, arXiv 2412.17041), there with 16-voxel
blocks, three quarters hidden, and L2 on hidden voxels. A convolution cannot skip what is hidden, so the encoder does
see zeros where the sparse variants (SparK, S3D) see nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from medmim.spec import PartSpec
from medmim_training.methods.masked import MaskedModelling


class MAECNN(MaskedModelling):
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

    def __init__(
        self,
        encoder: nn.Module,
        *,
        ratio: float = 0.75,
        hiding: Mapping[str, Any] | None = None,
        unit: Sequence[int] = (16, 16, 16),
        loss: Literal["l1", "mse"] = "mse",
    ) -> None:
        args = {"unit": list(unit)}
        super().__init__(
            encoder,
            PartSpec(kind="mae_cnn", args=args),
            ratio=ratio,
            hiding=hiding,
            target="voxels",
            loss=loss,
        )
