"""A volume on the voxels of another grid, zero where there is nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from torch import Tensor

DECIMALS = 3  # of a place in voxels, which count; what is smaller may be the rounding of affines
FACE = 10**-DECIMALS

SLAB_VOXELS = 8_000_000  # interpolated at a time; a coordinate grid needs 12 bytes a voxel


def resample_to(
    source: MetaTensor, affine: Tensor, shape: Sequence[int], *, mode: Literal["nearest", "bilinear"]
) -> MetaTensor:
    """Resamples a volume to another grid.

    Args:
        source: (C, D, H, W) with its affine.
        affine: Of the grid, voxel index to RAS mm: (4, 4).
        shape: Of the grid: (D', H', W').
        mode: "nearest" takes whole voxels, of two that are as near the one of the even index in `source`, whichever way
            the axes of the grid go; "bilinear" interpolates along all three axes.

    Returns:
        (C, D', H', W') in the type of `source`; zero where a voxel's centre lies outside of it.
    """
    places = find_places(source.affine, affine, shape) if mode == "nearest" else None
    values = _interpolated(source, affine, shape, mode=mode) if places is None else _picked(source.as_tensor(), places)
    return MetaTensor(values, affine=affine)


class Places(NamedTuple):
    """Where the voxels of a grid lie in a volume whose axes it runs along.

    Attributes:
        axes: Of the volume, that each axis of the grid runs along.
        along: By axis of the grid, where each of its slices lies, in voxels of the volume.
    """

    axes: tuple[int, int, int]
    along: tuple[Tensor, Tensor, Tensor]

    @property
    def by_source(self) -> tuple[Tensor, Tensor, Tensor]:
        """`along` by axis of the volume."""
        d, h, w = (self.along[self.axes.index(axis)] for axis in range(3))
        return d, h, w


def find_places(source: Tensor, affine: Tensor, shape: Sequence[int]) -> Places | None:
    """Where the voxels of a grid lie in a volume; None for a grid that is turned by other than 90°, or sheared.

    Args:
        source: Affine of the volume, (4, 4).
        affine: Of the grid, (4, 4).
        shape: Of the grid: (D', H', W').
    """
    to_source = torch.linalg.solve(source, affine.to(source))
    travelled = to_source[:3, :3].abs() * (torch.tensor(shape) - 1)  # voxels of the source, from end to end of the grid
    d, h, w = axes = tuple(to_source[:3, :3].abs().argmax(dim=0).tolist())
    travelled[list(axes), [0, 1, 2]] = 0
    if len(set(axes)) < 3 or travelled.max() >= FACE:
        return None
    along = (
        (to_source[axis, i] * torch.arange(shape[i], dtype=to_source.dtype) + to_source[axis, 3]).round(
            decimals=DECIMALS
        )
        for i, axis in enumerate(axes)
    )
    return Places((d, h, w), tuple(along))


def _picked(source: Tensor, places: Places) -> Tensor:
    """The voxel of (C, D, H, W) that is nearest to each of a grid, whose axes run along those of the source."""
    values = source.permute(0, *(axis + 1 for axis in places.axes))
    # Halfway between two it goes to the even one, so up as often as down: the whole is not shifted.
    d, h, w = (
        place.round().long().clamp(0, side - 1) for place, side in zip(places.along, values.shape[1:], strict=True)
    )
    inside = [is_within(place, side) for place, side in zip(places.along, values.shape[1:], strict=True)]
    values = values[:, d[:, None, None], h[:, None], w]
    for dim, those in enumerate(inside, start=1):
        values.index_fill_(dim, (~those).nonzero()[:, 0], 0)
    return values


def _interpolated(source: MetaTensor, affine: Tensor, shape: Sequence[int], *, mode: str) -> Tensor:
    """MONAI's resampling, slab by slab to bound the memory."""
    to_source = torch.linalg.solve(source.affine, affine.to(source.affine))
    result = torch.zeros(len(source), *shape, dtype=source.dtype)
    thickness = max(1, SLAB_VOXELS // (shape[1] * shape[2]))
    for start in range(0, shape[0], thickness):
        slab = result[:, start : start + thickness]
        offset = torch.eye(4, dtype=affine.dtype)
        offset[0, 3] = start
        grid = {"dst_affine": affine @ offset, "spatial_size": slab.shape[1:]}
        # Half a voxel around the outermost centres belongs to the source too, hence "border" and a separate inside.
        values = SpatialResample(mode=mode, padding_mode="border", dtype=torch.float32)(source, **grid)
        inside = _inside(source.shape[1:], to_source @ offset.to(to_source), slab.shape[1:])
        slab.copy_(values.as_tensor() * inside)
    return result


def _inside(sides: Sequence[int], to_source: Tensor, shape: Sequence[int]) -> Tensor:
    """Which voxels of a grid have their centre in a voxel of a source of these sides: (D, H, W) boolean."""
    indices = [torch.arange(side, dtype=to_source.dtype) for side in shape]
    inside = torch.ones(*shape, dtype=torch.bool)
    for side, (*steps, start) in zip(sides, to_source[:3], strict=True):
        along_d, along_h, along_w = (step * index for step, index in zip(steps, indices, strict=True))
        inside &= is_within(along_d[:, None, None] + along_h[:, None] + (along_w + start), side)
    return inside


def is_within(place: Tensor, side: int) -> Tensor:
    """Which places, in voxels along an axis, lie in one of its voxels, or on the face of the outermost.

    On the face lies a whole outermost slice where sizes and spacings are round: of 32 voxels of 1 mm on 16 of 2 mm.
    """
    return (place > -0.5 - FACE) & (place < side - 0.5 + FACE)
