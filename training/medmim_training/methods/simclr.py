"""SimCLR on volumes: two overlapping views of a scan find each other in the batch (Chen, T. et al. 2020).

The contrastive comparison of Chen, Z. et al. 2023 (arXiv 2204.11716), whose released script does not run: its
autoencoder skips the encoder and its data have no second view. This follows the description: NT-Xent with temperature
0.5 between two crops; the projection head is SimCLR's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medmim_training.methods.augment import random_appearance
from medmim_training.methods.base import MethodOutput
from medmim_training.methods.draws import Generators
from medmim_training.methods.losses import nt_xent
from medmim_training.store.views import OverlappingCrops


class SimCLR(nn.Module):
    """Pulls the pooled features of two views of one volume together, and those of different samples apart.

    Args:
        encoder: Any encoder.
        temperature: Of the similarity, above 0.
        overlap: Least share of a side that the two views have in common.
        hidden_dim: Width of the projection head.
        out_dim: Its outputs.

    Raises:
        ValueError: For a temperature or an overlap out of range.
    """

    decoder_spec, compares_samples = None, True

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.5,
        overlap: float = 0.5,
        hidden_dim: int = 2048,
        out_dim: int = 128,
    ) -> None:
        super().__init__()
        if temperature <= 0 or not 0 < overlap <= 1:
            raise ValueError(f"temperature {temperature} must be above 0, overlap {overlap} above 0 and at most 1")
        self.encoder = encoder
        self.temperature = temperature
        self.views = OverlappingCrops(count=2, overlap=overlap)
        self.project = nn.Sequential(
            nn.Linear(encoder.num_features, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim)
        )

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def forward(self, batch: Mapping[str, Tensor], generator: Generators = None) -> MethodOutput:
        """The loss of one batch.

        Args:
            batch: "x": two views a sample, (B, 2, in_chans, D, H, W) in network units.
            generator: On the CPU, one for the batch or one a sample; decides how the views look.
        """
        x = random_appearance(batch["x"].flatten(0, 1), generator=generator)  # (2B, C, D, H, W), views in turn
        pooled = self.encoder.forward_head(self.encoder.forward_features(x), pre_logits=True)  # (2B, C)
        first, second = self.project(pooled).unflatten(0, (-1, 2)).unbind(dim=1)  # each (B, out)
        loss = nt_xent(first, second, temperature=self.temperature)
        with torch.no_grad():
            # A collapsed encoder gives every sample the same features: their spread is then 0.
            spread = nn.functional.normalize(pooled.float(), dim=1).std(dim=0).mean() * pooled.shape[1] ** 0.5
        return MethodOutput(loss, logs={"spread": spread})
