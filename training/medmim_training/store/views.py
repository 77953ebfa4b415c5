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
    """Draws the boxes of one sample."""

    def starts(self, shape: Size, size: Size, generator: np.random.Generator) -> np.ndarray:
        """Where each view starts in a volume of `shape`: (V, 3) integers, for crops of `size`."""


@dataclass(frozen=True)
class OneCrop:
    """One box anywhere in the volume; one that is smaller than the crop lies anywhere in it."""

    def starts(self, shape: Size, size: Size, generator: np.random.Generator) -> np.ndarray:
        return _anywhere(shape, size, generator)[None]


@dataclass(frozen=True)
class OverlappingCrops:
    """Several boxes, each sharing at least a part of the first along every axis.

    Args:
        count: Views V.
        overlap: Least share of a side that a view has in common with the first, in (0, 1].
    """

    count: int = 2
    overlap: float = 0.5

    def starts(self, shape: Size, size: Size, generator: np.random.Generator) -> np.ndarray:
        first = _anywhere(shape, size, generator)
        low, high = _range(shape, size)
        reach = np.floor(np.array(size) * (1 - self.overlap)).astype(int)
        low, high = np.maximum(low, first - reach), np.minimum(high, first + reach)
        others = generator.integers(low, high + 1, size=(self.count - 1, 3))
        return np.concatenate([first[None], others])


def _range(shape: Size, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """First and last start along each axis."""
    room = np.array(shape) - np.array(size)
    return np.minimum(room, 0), np.maximum(room, 0)


def _anywhere(shape: Size, size: Size, generator: np.random.Generator) -> np.ndarray:
    low, high = _range(shape, size)
    return generator.integers(low, high + 1)
