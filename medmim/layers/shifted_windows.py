"""Windows of a token grid, shifted by half their size in every other block, and the attention inside them.

Legend: B batch, C channels, (Dg, Hg, Wg) token grid, n tokens of a window, M windows.

After Liu et al. 2021 (Swin, arXiv 2103.14030), in 3-D and with the peculiarities of MONAI's `SwinTransformer` (see
`medmim.models.swin`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from medmim.layers.tokens import Size
from medmim.layers.transformer import Attention

APART = -100.0  # added to the attention between tokens that only the shift brought together


def relative_position_index(window_size: Size) -> Tensor:
    """For each pair of tokens of a window, the row of the bias table that belongs to their offset: LongTensor (n, n).

    Rows are row-major over the offsets, from 1 - side to side - 1 along each axis.
    """
    axes = [torch.arange(side) for side in window_size]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)  # (3, n)
    d, h, w = place[:, :, None] - place[:, None, :] + torch.tensor(window_size)[:, None, None] - 1  # each (n, n), >= 0
    _, height, width = offsets(window_size)
    return (d * height + h) * width + w


def offsets(window_size: Size) -> Size:
    """Offsets along each axis that tokens of one window can have."""
    depth, height, width = (2 * side - 1 for side in window_size)
    return depth, height, width


class Windows(nn.Module):
    """How a token grid is cut into windows. Holds no weights, only what follows from the sizes.

    The cyclic shift puts tokens from opposite ends of the grid into the last windows along each axis, where they must
    be kept apart. Windows therefore come in at most 8 kinds, by the axes along which they are last, and are sorted by
    kind: attention needs one bias a kind instead of one a window.

    Args:
        grid_size: Tokens along (D, H, W).
        window_size: Tokens of a window along (D, H, W); shrinks to the grid.
        shifted: Shifts the windows by half their size, along axes with more than one window.
    """

    def __init__(self, grid_size: Size, window_size: Size, *, shifted: bool) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.size = tuple(min(grid, side) for grid, side in zip(grid_size, window_size, strict=True))
        self.counts = tuple(-(-grid // side) for grid, side in zip(grid_size, self.size, strict=True))
        self.shift = tuple(
            side // 2 if shifted and count > 1 else 0 for side, count in zip(self.size, self.counts, strict=True)
        )
        kinds = [
            tuple(shift > 0 and i == count - 1 for i, count, shift in zip(place, self.counts, self.shift, strict=True))
            for place in itertools.product(*map(range, self.counts))
        ]  # of each window, row-major
        sizes = sorted(Counter(kinds).items())
        self.kind_sizes = [number for _, number in sizes]
        order = sorted(range(len(kinds)), key=kinds.__getitem__)
        n = math.prod(self.size)
        apart = torch.stack([self._apart(kind) for kind, _ in sizes])  # (kinds, n, n)
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("unsorted", torch.argsort(self.order), persistent=False)
        self.register_buffer("barriers", torch.where(apart, APART, 0.0), persistent=False)
        self.register_buffer("position", relative_position_index(window_size)[:n, :n], persistent=False)

    def _apart(self, last: Sequence[bool]) -> Tensor:
        """Which tokens of a window, last along some axes, come from opposite ends of the grid: boolean (n, n)."""
        ends = [
            torch.arange(side) >= (side - shift if is_last else side)
            for side, shift, is_last in zip(self.size, self.shift, last, strict=True)
        ]
        end = torch.stack(torch.meshgrid(*ends, indexing="ij")).flatten(1)  # (3, n)
        return (end[:, :, None] != end[:, None, :]).any(dim=0)

    def cut(self, x: Tensor) -> Tensor:
        """A map (B, Dg, Hg, Wg, C) as windows (M, B, n, C), sorted by kind."""
        (p, q, r), (i, j, k) = self.size, self.counts
        d, h, w = self.grid_size
        if self.grid_size != (i * p, j * q, k * r):
            x = F.pad(x, (0, 0, 0, k * r - w, 0, j * q - h, 0, i * p - d))
        if any(self.shift):
            x = x.roll([-shift for shift in self.shift], dims=(1, 2, 3))
        x = rearrange(x, "b (i p) (j q) (k r) c -> (i j k) b (p q r) c", p=p, q=q, r=r)
        return x[self.order] if any(self.shift) else x

    def join(self, windows: Tensor) -> Tensor:
        """The exact inverse of `cut`."""
        (p, q, r), (i, j, k) = self.size, self.counts
        d, h, w = self.grid_size
        x = windows[self.unsorted] if any(self.shift) else windows
        x = rearrange(x, "(i j k) b (p q r) c -> b (i p) (j q) (k r) c", i=i, j=j, k=k, p=p, q=q, r=r)
        if any(self.shift):
            x = x.roll(self.shift, dims=(1, 2, 3))
        return x[:, :d, :h, :w]


class WindowAttention(Attention):
    """Self-attention within windows (M, B, n, C), with a learned bias for each offset, by torch's fused kernels."""

    def __init__(self, dim: int, num_heads: int, *, window_size: Size, qkv_bias: bool) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(offsets(window_size)), num_heads))

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        M, B, n, C = x.shape
        qkv = self.qkv(x).view(M, B, n, 3, self.num_heads, C // self.num_heads)
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)  # (3, M, B, heads, n, C / heads)
        bias = F.embedding(windows.position, self.relative_position_bias_table)  # (n, n, heads)
        bias = bias.permute(2, 0, 1).contiguous()
        attended = [
            F.scaled_dot_product_attention(*alike.flatten(1, 2), attn_mask=(bias + barrier)[None].to(x.dtype))
            for alike, barrier in zip(qkv.split(windows.kind_sizes, dim=1), windows.barriers, strict=True)
        ]  # of each kind (windows * B, heads, n, C / heads)
        return self.proj(torch.cat(attended).transpose(1, 2).reshape(M, B, n, C))
