"""Random crops from a store: sample number i is a function of the seed and i alone.

That makes a run independent of the number of workers and ranks: rank r of R draws the samples r, r + R, r + 2R, ..., no
sample is drawn twice, and a resumed run goes on at the sample where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

import blosc2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medmim.errors import SpecError
from medmim.spec import VolumeSpec
from medmim_training.store.index import BLOCK, Store, StoreEntry, read_array
from medmim_training.store.views import OneCrop, Views, anywhere, around

VOLUME_STREAM, CROP_STREAM = 0, 1  # independent random streams of one seed


class CropDataset(Dataset):
    """An endless sequence of samples, cut to `length`.

    A volume is drawn with a probability that grows with its foreground up to one crop's worth of voxels: a scan smaller
    than a crop counts for less, a long one does not drown the others. Where a crop runs past the volume it has the
    volume's minimum, and says so.

    Args:
        store: Where the volumes are.
        volume: Preprocessing; must fit the store's.
        size: Voxels of a crop along (D, H, W).
        length: Number of samples.
        seed: Decides all samples.
        views: Which boxes of a volume make a sample.
        crops_per_volume: Consecutive samples that come from one volume.
        foreground_power: What that foreground is raised to, from 1 down to 0, at which all volumes count alike.
        foreground_share: Share of the samples whose first crop is around a voxel near foreground, others are anywhere.
        mirror_axes: Axes of (D, H, W) along which a crop is mirrored, each with probability one half.

    Raises:
        SpecError: When the store does not fit, or does not say where the foreground is and that is asked for.
    """

    def __init__(
        self,
        store: Store,
        volume: VolumeSpec,
        *,
        size: tuple[int, int, int],
        length: int,
        seed: int,
        views: Views | None = None,
        crops_per_volume: int = 1,
        foreground_power: float = 1.0,
        foreground_share: float = 0.0,
        mirror_axes: Sequence[int] = (),
    ) -> None:
        store.check(volume)
        self.store, self.volume, self.size, self.views = store, volume, size, views or OneCrop()
        self.length, self.seed = length, seed
        self.crops_per_volume, self.mirror_axes = crops_per_volume, mirror_axes
        self.foreground_share = foreground_share
        if foreground_share and any(entry.occupancy is None for entry in store.entries):
            raise SpecError(
                f"{store.folder}: prepared by an older medmim, which did not note where the foreground is; prepare it "
                "anew, or set data.foreground_share to 0"
            )
        weights = np.array([min(entry.foreground, np.prod(size)) for entry in store.entries], dtype=np.float64)
        weights **= foreground_power
        self.cumulative = np.cumsum(weights / weights.sum())
        self._open: tuple[int, blosc2.NDArray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample `index`.

        Returns:
            "x": (V, C, *size) float32 in network units, one crop a view. "boxes": (V, 6) float32, start and end of each
            view along (D, H, W) as a share of the volume's sides. "inside": (V, 3, 2) int64, first voxel along each
            axis of a crop that lies inside the volume, and the one behind the last. "volume": its number in the store.
            "index": of the sample.
        """
        position = self.volume_of(index)
        entry, mapping = self.store.entries[position], self.store.intensity(position, self.volume)
        generator = np.random.default_rng([self.seed, CROP_STREAM, index])
        starts = self.views.starts(self._first(entry, generator), entry.shape, self.size, generator)
        crops, inside = zip(*(self._crop(position, start, generator) for start in starts), strict=True)
        boxes = np.concatenate([starts, starts + np.array(self.size)], axis=1) / np.tile(entry.shape, 2)
        return {
            "x": torch.from_numpy(mapping.apply(np.stack(crops))),
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "inside": torch.tensor(inside),
            "volume": torch.tensor(position),
            "index": torch.tensor(index),
        }

    def volume_of(self, index: int) -> int:
        """The number in the store of the volume that sample `index` is taken from."""
        draw = np.random.default_rng([self.seed, VOLUME_STREAM, index // self.crops_per_volume]).random()
        return min(int(np.searchsorted(self.cumulative, draw, side="right")), len(self.cumulative) - 1)

    def _first(self, entry: StoreEntry, generator: np.random.Generator) -> np.ndarray:
        """Where the sample's first crop starts."""
        if not self.foreground_share or generator.random() >= self.foreground_share:
            return anywhere(entry.shape, self.size, generator)
        blocks = entry.occupied_blocks()  # (blocks, 4): share of foreground, first voxel
        share, corner = blocks[:, 0], blocks[:, 1:]
        block = generator.choice(len(blocks), p=share / share.sum())
        return around(corner[block] + generator.integers(0, BLOCK, size=3), entry.shape, self.size)

    def _crop(self, position: int, start: np.ndarray, generator: np.random.Generator):
        """The crop (C, *size), and from where to where it is inside the volume along each axis."""
        entry = self.store.entries[position]
        crop = np.full((entry.channels, *self.size), entry.minimum, dtype=np.float32)
        source, target = [slice(None)], [slice(None)]
        for begin, stored, wanted in zip(start.tolist(), entry.shape, self.size, strict=True):
            low, high = max(begin, 0), min(begin + wanted, stored)
            source.append(slice(low, high))
            target.append(slice(low - begin, high - begin))
        crop[tuple(target)] = read_array(self._array(position), tuple(source))
        inside = [(place.start, place.stop) for place in target[1:]]
        mirrored = [axis for axis in self.mirror_axes if generator.random() < 0.5]
        for axis in mirrored:
            first, stop = inside[axis]
            inside[axis] = self.size[axis] - stop, self.size[axis] - first
        return np.flip(crop, [axis + 1 for axis in mirrored]), inside

    def _array(self, position: int) -> blosc2.NDArray:
        if self._open is None or self._open[0] != position:
            self._open = position, self.store.array(position)
        return self._open[1]
