"""From samples to batches on the device, by processes that read ahead."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


def batches(
    samples: Dataset, order: range, *, size: int, workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches of samples, each a dict of tensors.

    Args:
        samples: Where they come from.
        order: Which ones, in order.
        size: Samples of a batch.
        workers: Processes that read ahead; 0 reads in this one.
        device: Where the batches go.
    """
    loader = DataLoader(
        samples,
        batch_size=size,
        sampler=order,
        num_workers=workers,
        # Forking a process in which torch's threads run can hang.
        multiprocessing_context="spawn" if workers else None,
    )
    for batch in loader:
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
