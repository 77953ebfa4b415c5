"""Which boxes of a volume make one sample: one crop, or several that overlap.

A box is given by where it starts, in voxels of the stored volume; it may start before 0 or end behind the volume where
the volume is smaller than the crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

Size = tuple[int, int, int]


class Views(Protocol):
    """Draws the boxes of one sample, `count` of them."""

    count: int

    def starts(self, first: np.ndarray, shape: Size, size: Size, generator: np.random.Generator) -> np.ndarray:
        """Where each view starts in a volume of `shape`, the first one at `first`: (V, 3) integers, for `size`."""


@dataclass(frozen=True)
class OneCrop:
    """One box."""

    count: int = 1

    def starts(self, first: np.ndarray, shape: Size, size: Size, generator: np.random.Generator) -> np.ndarray:
        return first[None]


@dataclass(frozen=True)
class OverlappingCrops:
    """Several boxes, each sharing at least a part of the first along every axis.

    Args:
        count: Views V.
        overlap: Least share of a side that a view has in common with the first, in (0, 1].
    """

    count: int = 2
    overlap: float = 0.5

    def starts(self, first: np.ndarray, shape: Size, size: Size, generator: np.random.Generator) -> np.ndarray:
        low, high = _range(shape, size)
        reach = np.floor(np.array(size) * (1 - self.overlap)).astype(int)
        low, high = np.maximum(low, first - reach), np.minimum(high, first + reach)
        others = generator.integers(low, high + 1, size=(self.count - 1, 3))
        return np.concatenate([first[None], others])


def _range(shape: Size, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """First and last start along each axis."""
    room = np.array(shape) - np.array(size)
    return np.minimum(room, 0), np.maximum(room, 0)


def anywhere(shape: Size, size: Size, generator: np.random.Generator) -> np.ndarray:
    """A start anywhere in the volume; a volume that is smaller than the crop lies anywhere in it."""
    low, high = _range(shape, size)
    return generator.integers(low, high + 1)


def around(voxel: np.ndarray, shape: Size, size: Size) -> np.ndarray:
    """The start that puts a voxel into the middle of the crop, or as near to it as the volume's border allows."""
    low, high = _range(shape, size)
    return np.clip(voxel - np.array(size) // 2, low, high)
