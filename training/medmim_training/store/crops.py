"""Random crops from a store: crop number i is a function of the seed and i alone.

That makes a run independent of the number of workers and ranks: rank r of R draws the crops r, r + R, r + 2R, ..., no
crop is drawn twice, and a resumed run goes on at the crop where it stopped.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medmim.spec import VolumeSpec
from medmim_training.store.index import Store

VOLUME_STREAM, CROP_STREAM = 0, 1  # independent random streams of one seed


class CropDataset(Dataset):
    """An endless sequence of crops, cut to `length`.

    A volume is drawn with a probability that grows with its foreground up to one crop's worth of voxels: a scan smaller
    than a crop counts for less, a long one does not drown the others. Where a volume is smaller than the crop it lies
    at a random place in it, the rest filled with the volume's minimum.

    Args:
        store: Where the volumes are.
        volume: Preprocessing; must fit the store's.
        size: Voxels of a crop along (D, H, W).
        length: Number of crops.
        seed: Decides all crops.
        crops_per_volume: Consecutive crops that come from one volume.
        mirror_axes: Axes of (D, H, W) along which a crop is mirrored, each with probability one half.
    """

    def __init__(
        self,
        store: Store,
        volume: VolumeSpec,
        *,
        size: tuple[int, int, int],
        length: int,
        seed: int,
        crops_per_volume: int = 1,
        mirror_axes: tuple[int, ...] = (),
    ) -> None:
        store.check(volume)
        self.store, self.volume, self.size = store, volume, size
        self.length, self.seed = length, seed
        self.crops_per_volume, self.mirror_axes = crops_per_volume, mirror_axes
        weights = np.array([min(entry.foreground, np.prod(size)) for entry in store.entries], dtype=np.float64)
        self.cumulative = np.cumsum(weights / weights.sum())
        self._open: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Crop `index`: "x" (C, *size) float32 in network units, and "volume", its number in the store."""
        position = self.volume_of(index)
        generator = np.random.default_rng([self.seed, CROP_STREAM, index])
        crop = self._crop(position, generator)
        mirrored = [axis + 1 for axis in self.mirror_axes if generator.random() < 0.5]
        x = torch.from_numpy(np.ascontiguousarray(np.flip(crop, mirrored)))
        return {"x": x, "volume": torch.tensor(position)}

    def volume_of(self, index: int) -> int:
        """The number in the store of the volume that crop `index` is taken from."""
        draw = np.random.default_rng([self.seed, VOLUME_STREAM, index // self.crops_per_volume]).random()
        return min(int(np.searchsorted(self.cumulative, draw, side="right")), len(self.cumulative) - 1)

    def _crop(self, position: int, generator: np.random.Generator) -> np.ndarray:
        entry, mapping = self.store.entries[position], self.store.intensity(position, self.volume)
        crop = np.full((entry.channels, *self.size), entry.minimum, dtype=np.float32)
        source, target = [slice(None)], [slice(None)]
        for stored, wanted in zip(entry.shape, self.size, strict=True):
            start = int(generator.integers(abs(stored - wanted) + 1))
            source.append(slice(start, start + wanted) if stored > wanted else slice(None))
            target.append(slice(start, start + stored) if stored < wanted else slice(None))
        crop[tuple(target)] = self._array(position)[tuple(source)]
        return mapping.apply(crop)

    def _array(self, position: int):
        if self._open is None or self._open[0] != position:
            self._open = position, self.store.array(position)
        return self._open[1]
