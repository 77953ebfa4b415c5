"""Random crops from a store: sample number i is a function of the seed and i alone.

That makes a run independent of the number of workers and ranks: rank r of R draws the samples r, r + R, r + 2R, ..., no
sample is drawn twice, and a resumed run goes on at the sample where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import blosc2
import numpy as np
import torch
from torch import Tensor

from medmim.errors import SpecError
from medmim.spec import VolumeSpec
from medmim_training.loading import Samples
from medmim_training.store.index import BLOCK, Store, StoreEntry, read_box
from medmim_training.store.views import OneCrop, Views, anywhere, around

VOLUME_STREAM, CROP_STREAM = 0, 1  # independent random streams of one seed


class CropDataset(Samples):
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
        if not weights.any():  # no scan has foreground, so none has more than another
            weights[:] = 1
        self.cumulative = np.cumsum(weights / weights.sum())
        self._forget()

    def _forget(self) -> None:
        self._open: tuple[int, blosc2.NDArray] | None = None
        self._memory = np.empty(0, np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: all but what was read, and the file that is open."""
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_memory")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

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
        count, channels = self.views.count, self.store.entries[self.volume_of(index)].channels
        sample = {
            "x": torch.empty(count, channels, *self.size),
            "boxes": torch.empty(count, 6),
            "inside": torch.empty(count, 3, 2, dtype=torch.int64),
            "volume": torch.empty((), dtype=torch.int64),
            "index": torch.empty((), dtype=torch.int64),
        }
        self.read(index, sample)
        return sample

    def read(self, index: int, out: dict[str, Tensor]) -> None:
        """Writes sample `index` to `out`, with no copy in between."""
        position = self.volume_of(index)
        entry = self.store.entries[position]
        generator = np.random.default_rng([self.seed, CROP_STREAM, index])
        starts = self.views.starts(self._first(entry, generator), entry.shape, self.size, generator)
        for start, x, inside in zip(starts, out["x"].numpy(), out["inside"].numpy(), strict=True):
            self._crop(position, start, generator, x, inside)
        boxes = np.concatenate([starts, starts + np.array(self.size)], axis=1)
        out["boxes"].numpy()[:] = boxes / np.tile(entry.shape, 2)
        out["volume"].fill_(position)
        out["index"].fill_(index)

    def volume_of(self, index: int) -> int:
        """The number in the store of the volume that sample `index` is taken from."""
        draw = np.random.default_rng([self.seed, VOLUME_STREAM, index // self.crops_per_volume]).random()
        return min(int(np.searchsorted(self.cumulative, draw, side="right")), len(self.cumulative) - 1)

    def _first(self, entry: StoreEntry, generator: np.random.Generator) -> np.ndarray:
        """Where the sample's first crop starts."""
        if not self.foreground_share or generator.random() >= self.foreground_share:
            return anywhere(entry.shape, self.size, generator)
        blocks = entry.occupied_blocks()  # (blocks, 4): share of foreground, first voxel
        if not len(blocks):
            return anywhere(entry.shape, self.size, generator)
        share, corner = blocks[:, 0], blocks[:, 1:]
        block = generator.choice(len(blocks), p=share / share.sum())
        return around(corner[block] + generator.integers(0, BLOCK, size=3), entry.shape, self.size)

    def _crop(
        self, position: int, start: np.ndarray, generator: np.random.Generator, x: np.ndarray, inside: np.ndarray
    ) -> None:
        """Writes the crop to `x` (C, *size), and from where to where it is inside of the volume to `inside` (3, 2)."""
        entry, mapping = self.store.entries[position], self.store.intensity(position, self.volume)
        low, high = np.maximum(start, 0), np.minimum(start + np.array(self.size), entry.shape)
        part = self._read_part(position, low, high)
        inside[:] = np.stack([low - start, high - start], axis=1)
        for axis in self.mirror_axes:
            if generator.random() < 0.5:
                part = np.flip(part, axis + 1)
                inside[axis] = self.size[axis] - inside[axis, ::-1]
        if part.shape != x.shape:
            mapping.write(np.full(1, entry.minimum), x)
        mapping.write(part, x[:, *(slice(first, stop) for first, stop in inside)])

    def _read_part(self, position: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """A box (C, D, H, W) of a stored volume, in memory that the next one is read into as well."""
        if self._open is None or self._open[0] != position:
            self._open = position, self.store.array(position)
        array, entry = self._open[1], self.store.entries[position]
        shape = entry.channels, *(high - low).tolist()
        nbytes = math.prod(shape) * array.dtype.itemsize
        if self._memory.nbytes < nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        part = self._memory[:nbytes].view(array.dtype).reshape(shape)
        read_box(array, (0, *low.tolist()), (entry.channels, *high.tolist()), part)
        return part
