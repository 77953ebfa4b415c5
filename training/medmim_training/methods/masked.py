"""What all masked image modelling shares: hide, let a decoder predict what is hidden, compare.

How the encoder is kept from seeing it and what predicts is the decoder's part (`medmim.heads`), which is published
beside the encoder; so a method of this kind is a decoder and its settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from medmim.factory import decoder_class
from medmim.layers.tokens import count_hidden, gather_patches, to_grid_size
from medmim.reconstruction import Reconstruction
from medmim.spec import PartSpec
from medmim_training.methods.base import MethodOutput, check_arguments, inside_scan, named_choice, paste
from medmim_training.methods.draws import Generators
from medmim_training.methods.hiding import Hiding
from medmim_training.methods.losses import LOSSES, hidden_loss
from medmim_training.methods.targets import TARGETS
from medmim_training.store.views import OneCrop


class MaskedModelling(nn.Module):
    """Predicts hidden units of a volume from the others.

    Args:
        encoder: The encoder.
        decoder: Which pretraining decoder predicts for it, and the arguments that the encoder does not decide.
        ratio: Share of the units to hide, exactly `int(ratio * N)` of each sample.
        hiding: Other arguments of `Hiding`, such as {"rule": "block"}.
        target: One of `TARGETS`, what is predicted of a unit; a decoder that predicts no voxels is not published.
        loss: One of `LOSSES`, mean over the voxels of hidden units.

    Raises:
        SpecError: For an argument of the decoder or the rule that does not exist.
        ValueError: For an unknown choice, units that do not divide the input, or a ratio that hides none or all.
    """

    views, compares_samples = OneCrop(), False

    def __init__(
        self,
        encoder: nn.Module,
        decoder: PartSpec,
        *,
        ratio: float,
        hiding: Mapping[str, Any] | None,
        target: str,
        loss: str,
    ) -> None:
        super().__init__()
        cls = decoder_class(decoder.kind)
        check_arguments(decoder.args, cls, name=f"the decoder {decoder.kind}", key="method.args.decoder")
        check_arguments(hiding or {}, Hiding, name="a hiding rule", key="method.args.hiding")
        self.encoder = encoder
        # What reads a published decoder takes its output for voxels.
        self.decoder_spec = decoder if target == "voxels" else None
        self.decoder = cls(**{**cls.of_encoder(encoder), **decoder.args})
        count_hidden(math.prod(to_grid_size(encoder.img_size, self.decoder.unit)), ratio)
        self.hiding = Hiding(ratio=ratio, **(hiding or {}))
        self.target = named_choice("target", target, TARGETS)
        self.loss = named_choice("loss", loss, LOSSES)

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
        x, unit = batch["x"].flatten(0, 1), self.decoder.unit  # (B, C, D, H, W)
        idx_keep, idx_hidden = self.hiding(x, unit, generator=generator)
        predicted = self.decoder.predict(self.encoder, x, idx_keep, idx_hidden).float()  # (B, M, V)
        hidden = gather_patches(x, idx_hidden, unit)
        target = self.target.of(hidden)
        loss = hidden_loss(self.loss, predicted, target, inside_scan(batch, idx_hidden, unit))

        def picture() -> Reconstruction:
            return paste(x, self.target.to_voxels(predicted, hidden), idx_hidden, unit)

        return MethodOutput(loss, picture=picture)
