"""Position embeddings of a 3-D token grid: fixed sine-cosine, and resampling of learned ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from medmim.layers.tokens import Size

Place = tuple[float, float, float]  # in tokens along (D, H, W)


def sincos_position(grid_size: Size, dim: int, first: Place = (0.0, 0.0, 0.0)) -> Tensor:
    """Fixed sine-cosine embedding of a token grid (Vaswani et al. 2017; in 2-D as He et al. 2022).

    Each axis gets a third of the channels, half of them sines and half cosines of the token's place at frequencies
    10000^(-i/n). Where `dim` is no multiple of 6, the channels left over at the end are zero.

    Args:
        grid_size: Tokens along (D, H, W).
        dim: Channels, at least 6.
        first: Place of the first token; that of the next one along an axis is 1 more.

    Returns:
        (1, N, dim) in float32, tokens row-major.

    Raises:
        ValueError: When `dim` is below 6.
    """
    frequencies = dim // 6
    if frequencies == 0:
        raise ValueError(f"a 3-D sine-cosine embedding needs at least 6 channels, not {dim}")
    if torch.get_default_device().type == "meta":  # only the shape counts; arithmetic would import torch's compiler
        return torch.empty(1, math.prod(grid_size), dim)
    # float64 so that the table is the same to the last bit wherever it is rebuilt.
    omega = 10000.0 ** -(torch.arange(frequencies, dtype=torch.float64) / frequencies)
    # Of each axis alone, then repeated along the others: a sine of every token is a hundred times the work.
    places = [start + torch.arange(side, dtype=torch.float64) for side, start in zip(grid_size, first, strict=True)]
    phases = [along[:, None] * omega for along in places]  # 3 x (side, f)
    waves = [torch.cat((phase.sin(), phase.cos()), dim=1) for phase in phases]
    table = torch.cat([_along(axis, wave, grid_size) for axis, wave in enumerate(waves)], dim=-1)  # (D, H, W, 6f)
    return F.pad(table.flatten(0, 2), (0, dim - table.shape[-1]))[None].float()


def _along(axis: int, wave: Tensor, grid_size: Size) -> Tensor:
    """What belongs to the places of one axis (side, n), at every token (D, H, W, n)."""
    sides = [1, 1, 1, wave.shape[1]]
    sides[axis] = len(wave)
    return wave.view(sides).expand(*grid_size, -1)


def resample_position(position: Tensor, old_grid: Size, new_grid: Size) -> Tensor:
    """Trilinear resampling of a learned embedding (1, N, C) from one token grid to another, anisotropic too."""
    if tuple(old_grid) == tuple(new_grid):
        return position
    d, h, w = old_grid
    volume = rearrange(position.float(), "b (d h w) c -> b c d h w", d=d, h=h, w=w)
    volume = F.interpolate(volume, size=tuple(new_grid), mode="trilinear", align_corners=False)
    return rearrange(volume, "b c d h w -> b (d h w) c").to(position.dtype)
