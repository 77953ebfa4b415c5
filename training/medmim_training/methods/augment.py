"""Random changes of appearance, batched on tensors: after collation they run on the device, once a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medmim_training.methods.draws import Generators, normal, uniform

GAMMA, CONTRAST, NOISE, BLUR = (0.7, 1.5), (0.75, 1.25), 0.1, 0.5


def random_appearance(x: Tensor, *, generator: Generators) -> Tensor:
    """Another look of the same anatomy: gamma, contrast around the mean, blur for half of the samples, noise.

    The ranges are nnU-Net's usual ones (Isensee et al. 2021, supplement 4); geometry is left to the views.

    Args:
        x: (B, C, D, H, W) in network units, about [0, 1].
        generator: On the CPU, one for the batch or one a sample.

    Returns:
        A new tensor of the same shape; not clipped.
    """
    draws = uniform(len(x), 5, 1, 1, 1, 1, generator=generator).to(x).unbind(dim=1)  # each (B, 1, 1, 1, 1)
    low = x.amin(dim=(1, 2, 3, 4), keepdim=True)
    extent = (x.amax(dim=(1, 2, 3, 4), keepdim=True) - low).clamp(min=1e-6)
    x = ((x - low) / extent) ** _between(GAMMA, draws[0]) * extent + low
    mean = x.mean(dim=(1, 2, 3, 4), keepdim=True)
    x = (x - mean) * _between(CONTRAST, draws[1]) + mean
    blurred = F.avg_pool3d(x, 3, stride=1, padding=1, count_include_pad=False)
    x = torch.where(draws[2] < BLUR, torch.lerp(x, blurred, draws[3]), x)
    noise = normal(*x.shape, generator=generator).to(x)
    return x + noise * (NOISE * draws[4])


def _between(limits: tuple[float, float], draw: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * draw
