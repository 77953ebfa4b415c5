"""Windows over a volume of any size, on its token grid.

Windows start at multiples of the patch size, and the last one along each axis ends with the volume. So the tokens of
overlapping windows lie on each other, and a network sees padding only where the volume ends inside a patch or is
smaller than a window.

Legend: C channels, (D, H, W) voxels of the volume, (Dg, Hg, Wg) its token grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from medmim.layers.tokens import Size

Window = tuple[slice, slice, slice]  # of the token grid


def covering_grid(size: Size, patch_size: Size, window_grid: Size) -> Size:
    """The token grid (Dg, Hg, Wg) of a volume: its size over the patch's, rounded up, and at least a window."""
    depth, height, width = (
        max(math.ceil(side / patch), window) for side, patch, window in zip(size, patch_size, window_grid, strict=True)
    )
    return depth, height, width


def cover(grid_size: Size, window_grid: Size, *, overlap: float = 0.0) -> Iterator[Window]:
    """Windows that cover a token grid.

    Args:
        grid_size: (Dg, Hg, Wg), no side below that of a window.
        window_grid: Tokens of a window along each axis.
        overlap: Share of a window that the next one covers again, 0 to below 1; the last one may cover more.

    Raises:
        ValueError: For another overlap.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap} must be at least 0 and below 1")
    starts = []
    for side, window in zip(grid_size, window_grid, strict=True):
        step = max(1, round(window * (1 - overlap)))
        starts.append([*range(0, side - window, step), side - window])
    for corner in itertools.product(*starts):
        yield tuple(slice(start, start + window) for start, window in zip(corner, window_grid, strict=True))


def in_batches(windows: Sequence[Window], batch_size: int) -> Iterator[Sequence[Window]]:
    """Windows in lists of at most `batch_size`.

    Raises:
        ValueError: For a size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    for start in range(0, len(windows), batch_size):
        yield windows[start : start + batch_size]


def to_voxels(window: Window, patch_size: Size) -> Window:
    """The voxels of a window, which may run past the end of the volume."""
    return tuple(
        slice(tokens.start * patch, tokens.stop * patch) for tokens, patch in zip(window, patch_size, strict=True)
    )


def crop_window(x: Tensor, window: Window, patch_size: Size, *, fill: float) -> Tensor:
    """The voxels of a window of a volume (C, D, H, W), with `fill` where the volume ends before the window does.

    A view of the volume where it does not.
    """
    voxels = to_voxels(window, patch_size)
    crop = x[:, *voxels]
    missing = [side.stop - side.start - have for side, have in zip(voxels, crop.shape[1:], strict=True)]
    if not any(missing):
        return crop
    return F.pad(crop, (0, missing[2], 0, missing[1], 0, missing[0]), value=fill)
