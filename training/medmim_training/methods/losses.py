"""Losses: of hidden voxels against what they were, and of views against each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss}


def hidden_loss(kind: Callable[..., Tensor], predicted: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """Mean error over the hidden voxels that count, of each sample, then over samples.

    So a scan that fills a tenth of its crop weighs as much as one that fills it all, and a batch computed in parts has
    the mean of the parts' losses.

    Args:
        kind: One of `LOSSES`.
        predicted: (B, M, V).
        target: (B, M, V).
        counted: Boolean (B, M, V); None counts all.
    """
    if counted is None:
        return kind(predicted, target)
    error = kind(predicted, target, reduction="none").masked_fill(~counted, 0).flatten(1).sum(dim=1)
    return (error / counted.flatten(1).sum(dim=1).clamp(min=1)).mean()


def nt_xent(first: Tensor, second: Tensor, *, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020, SimCLR, equation 1).

    Each view must find its partner among all other views of the batch, of all ranks when there are several.

    Args:
        first: One view of each sample, (B, C).
        second: The other view, (B, C).
        temperature: Above 0.

    Returns:
        Scalar; the mean over both directions. With several ranks it is this rank's share, so that the mean over ranks
        is the loss of the joined batch.
    """
    own = F.normalize(torch.cat([first, second]).float(), dim=1)  # (2B, C)
    rank, every = _gather(own)  # (R * 2B, C)
    with torch.autocast(own.device.type, enabled=False):  # which would round what the temperature is to magnify
        similarity = own @ every.T / temperature  # (2B, R * 2B)
    batch, offset = len(first), rank * len(own)
    index = torch.arange(len(own), device=own.device)
    similarity = similarity.scatter(1, (index + offset)[:, None], float("-inf"))  # nobody is its own partner
    return F.cross_entropy(similarity, (index + batch) % len(own) + offset)


def _gather(own: Tensor) -> tuple[int, Tensor]:
    """The rank of this process, and the rows of all ranks with gradients flowing back to each."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 0, own
    from torch.distributed.nn.functional import all_gather

    return dist.get_rank(), torch.cat(all_gather(own))
