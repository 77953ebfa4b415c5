"""Voxel values to the range that a network expects.

Pretraining and use share this file: the training store keeps volumes in the units of the scan, with what
`intensity_map` gave for the resampled scan when it was prepared; `medmim.transforms` calls it on the resampled scan.
Both see the whole volume, so a voxel gets the same value in pretraining as at use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from medmim.spec import Percentile, Window, ZScore

if TYPE_CHECKING:
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)

ROUNDING = 2e-6  # of its value, by which resampling may raise a voxel of a constant background; seen: 6e-7

SAMPLE_SIZE = 2_000_000  # voxels that statistics are taken from; at least 1/8 of it in a volume that is larger


@dataclass(frozen=True)
class IntensityMap:
    """A linear map that takes `low` to 0 and `high` to 1.

    Attributes:
        low: In the units of the scan.
        high: In the units of the scan; equal to `low` for a constant volume, which maps to zeros.
        clip: Whether values outside [low, high] are clipped.
    """

    low: float
    high: float
    clip: bool

    def apply(self, x: Array) -> Array:
        """Scan units to network units; the type and device of `x` stay, integers become float32.

        Args:
            x: Array or tensor of any shape, in the units of the scan.
        """
        if isinstance(x, np.ndarray) and x.dtype.kind != "f":
            x = x.astype(np.float32)
        scaled = (x - self.low) * (1 / self.range)
        return scaled.clip(0, 1) if self.clip else scaled

    def write(self, x: np.ndarray, out: np.ndarray) -> None:
        """What `apply` gives for `x` as float32, bit for bit, written to `out`.

        Args:
            x: Of any type and of the shape of `out`, or one value.
            out: Float32.
        """
        np.subtract(x, self.low, out=out, dtype=np.float32, casting="unsafe")
        np.multiply(out, 1 / self.range, out=out)
        if self.clip:
            np.clip(out, 0, 1, out=out)

    @property
    def range(self) -> float:
        # A constant volume: every x - low is 0, so any finite divisor gives zeros.
        return self.high - self.low or 1.0


def intensity_map(rule: Window | Percentile | ZScore, array: np.ndarray | torch.Tensor) -> IntensityMap:
    """The map that `rule` prescribes for one channel of one volume.

    Args:
        rule: From a `VolumeSpec`.
        array: The whole channel, any shape, in the units of the scan. `Percentile` and `ZScore` look at every
            n-th voxel along each of the last three axes, with n the smallest that leaves at most `SAMPLE_SIZE`: the
            same volume always gives the same map, and one of 512 x 512 x 600 takes a fraction of a second.

    Returns:
        The map, to be applied to the channel or to any crop of it.
    """
    if isinstance(rule, Window):
        return IntensityMap(rule.low, rule.high, clip=True)
    array = np.asarray(array)
    foreground = _foreground_sample(array)
    if isinstance(rule, Percentile):
        low, high = (float(limit) for limit in np.percentile(foreground, (rule.low, rule.high)))
        if low == high:  # one value above the minimum, as in a binary shape
            low = float(array.min())
        return IntensityMap(low, high, clip=True)
    mean = float(foreground.mean(dtype=np.float64))
    return IntensityMap(mean, mean + float(foreground.std(dtype=np.float64)), clip=False)


def background_level(array: np.ndarray) -> float:
    """The value up to which voxels of a resampled volume are background: its minimum, and what rounding adds to it.

    Where the background is not 0, weights that do not add up to 1 to the last bit leave most of it above the minimum.
    """
    low = float(array.min())
    return low + ROUNDING * abs(low)


def _foreground_sample(array: np.ndarray) -> np.ndarray:
    """Voxels of a regular sample that are above the volume's background; the whole sample when none is."""
    stride = math.ceil((array.size / SAMPLE_SIZE) ** (1 / 3))
    sample = array[(..., *(slice(None, None, stride),) * min(3, array.ndim))]
    above = sample[sample > background_level(array)]
    return above if above.size else sample.reshape(-1)
