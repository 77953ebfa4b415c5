"""The token grid: the one place where the order of tokens, and of voxels inside a token, is written.

Legend: B batch, C channels, (D, H, W) voxels, (Dg, Hg, Wg) token grid, N = Dg*Hg*Wg tokens, (p, q, r) patch size in
voxels, K kept or hidden tokens, V = C*p*q*r voxels of a patch. Tokens are row-major over (Dg, Hg, Wg); voxels inside a
token are row-major over (C, p, q, r), the order of a convolution's weight.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

Size = tuple[int, int, int]


def to_size(value: Any, name: str) -> Size:
    """Three sides along (D, H, W): those given, or one number for a cube, as timm and MONAI take it.

    Args:
        value: What a caller gave.
        name: Of the argument, for the error.

    Raises:
        ValueError: For anything but one or three whole numbers of at least 1.
    """
    try:
        sides = (operator.index(value),) * 3  # an index is a whole number of any library, and no float or text
    except TypeError:
        sides = value
    try:
        depth, height, width = map(operator.index, sides)
        if min(depth, height, width) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} is {value!r}; give three whole numbers of at least 1 along (D, H, W), or one for a cube"
        ) from None
    return depth, height, width


def to_grid_size(img_size: Size, patch_size: Size) -> Size:
    """Tokens along each axis.

    Raises:
        ValueError: When a side of `img_size` is not a multiple of the patch's.
    """
    if any(side % patch for side, patch in zip(img_size, patch_size, strict=True)):
        raise ValueError(f"img_size {tuple(img_size)} is not a multiple of patch_size {tuple(patch_size)}")
    depth, height, width = (side // patch for side, patch in zip(img_size, patch_size, strict=True))
    return depth, height, width


def patchify(x: Tensor, patch_size: Size) -> Tensor:
    """Cuts volumes (B, C, D, H, W) into patches (B, N, V)."""
    p, q, r = patch_size
    return rearrange(x, "b c (d p) (h q) (w r) -> b (d h w) (c p q r)", p=p, q=q, r=r)


def unpatchify(patches: Tensor, patch_size: Size, grid_size: Size) -> Tensor:
    """The exact inverse of `patchify`: patches (B, N, V) to volumes (B, C, D, H, W)."""
    (p, q, r), (d, h, w) = patch_size, grid_size
    return rearrange(patches, "b (d h w) (c p q r) -> b c (d p) (h q) (w r)", d=d, h=h, w=w, p=p, q=q, r=r)


def patch_view(x: Tensor, patch_size: Size) -> Tensor:
    """Volumes (B, C, D, H, W) as patches (B, Dg, Hg, Wg, C, p, q, r), a view: writing to it writes to the volumes."""
    p, q, r = patch_size
    return rearrange(x, "b c (d p) (h q) (w r) -> b d h w c p q r", p=p, q=q, r=r)


def gather_patches(x: Tensor, idx: Tensor, patch_size: Size) -> Tensor:
    """The patches `idx` (B, K) of volumes (B, C, D, H, W), as (B, K, V), without copying the others."""
    grid = patch_view(x, patch_size)
    height, width = grid.shape[2:4]
    b = torch.arange(idx.shape[0], device=idx.device)[:, None]
    return grid[b, idx // (height * width), idx // width % height, idx % width].flatten(2)  # (B, K, C, p, q, r) -> V


def gather_tokens(tokens: Tensor, idx: Tensor) -> Tensor:
    """Picks tokens (B, N, C) by index (B, K), giving (B, K, C)."""
    return tokens.gather(1, idx[..., None].expand(-1, -1, tokens.shape[-1]))


def scatter_tokens(base: Tensor, idx: Tensor, tokens: Tensor) -> Tensor:
    """A copy of `base` (B, N, C) with the tokens at `idx` (B, K) replaced by `tokens` (B, K, C)."""
    return base.scatter(1, idx[..., None].expand(-1, -1, tokens.shape[-1]), tokens)


def random_hiding(
    batch: int, num_tokens: int, ratio: float, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Hides exactly `int(ratio * num_tokens)` tokens of each sample, uniformly at random (He et al. 2022, MAE).

    Args:
        batch: B.
        num_tokens: N.
        ratio: Share of tokens to hide, between 0 and 1; at least one token must stay and one must go.
        generator: CPU generator; None uses torch's global one.

    Returns:
        `idx_keep` (B, N - K) and `idx_hidden` (B, K): CPU LongTensors, ascending, a partition of 0..N-1.

    Raises:
        ValueError: When nothing or everything would be hidden.
    """
    return hide_highest(torch.rand(batch, num_tokens, generator=generator), ratio)


def count_hidden(num_tokens: int, ratio: float) -> int:
    """How many of a sample's tokens a ratio hides, `int(ratio * N)`.

    Raises:
        ValueError: When nothing or everything would be hidden.
    """
    hidden = int(ratio * num_tokens)
    if not 0 < hidden < num_tokens:
        raise ValueError(f"ratio {ratio} hides {hidden} of {num_tokens} tokens; at least one must stay and one must go")
    return hidden


def hide_highest(scores: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Hides exactly `int(ratio * N)` tokens of each sample, those with the highest scores (B, N).

    Every hiding rule is a score; the exact count is what lets samples with different hidden tokens share a batch.

    Returns:
        `idx_keep` and `idx_hidden`, as `random_hiding`, on the device of the scores.

    Raises:
        ValueError: When nothing or everything would be hidden.
    """
    num_tokens = scores.shape[1]
    kept = num_tokens - count_hidden(num_tokens, ratio)
    order = scores.argsort(dim=1)
    return order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values


def hidden_voxels(idx_hidden: Tensor, patch_size: Size, grid_size: Size) -> Tensor:
    """Boolean volumes (B, 1, D, H, W), True at the voxels of the tokens `idx_hidden` (B, K)."""
    hidden = torch.zeros(idx_hidden.shape[0], math.prod(grid_size), dtype=torch.bool, device=idx_hidden.device)
    hidden.scatter_(1, idx_hidden, True)
    return unpatchify(hidden[..., None].expand(-1, -1, math.prod(patch_size)), patch_size, grid_size)
