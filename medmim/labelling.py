"""The class of each voxel of a volume of any size, from the scores of windows, within bounded memory.

Legend: B windows, K classes, (D, H, W) voxels of the volume, (D', H', W') voxels to label.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from monai.data.utils import compute_importance_map
from torch import Tensor

from medmim.heads.segmenter import Segmenter
from medmim.inference import evaluating
from medmim.labels import label_type
from medmim.layers.tokens import Size
from medmim.resampling import is_within
from medmim.windows import Window, cover, covering_grid, crop_window, in_batches, to_voxels

BAND_BYTES = 1_000_000_000  # of scores kept at a time
CHUNK = 8_000_000  # scores interpolated at a time


@torch.inference_mode()
def predict_labels(
    model: Segmenter,
    x: Tensor,
    *,
    places: Sequence[Tensor] | None = None,
    overlap: float = 0.5,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    band_bytes: int = BAND_BYTES,
) -> Tensor:
    """Labels a volume of any size window by window (`medmim.windows`).

    Scores of overlapping windows are averaged with Gaussian weights, because voxels at the rim of a window saw less
    around them; the class with the highest score wins. Scores are kept for a band of a window's depth, which moves
    along D: slices that no window will reach again are labelled and dropped. Where a band over the whole of H is too
    large, as with many classes, it goes through strips of H one after the other, and windows at a seam are computed
    twice.

    Args:
        model: To (B, K, *img_size) from (B, channels, *img_size). It runs in evaluation mode, on the device it is on.
        x: (channels, D, H, W) in network units.
        places: Where the voxels to label lie, in voxels of `x`: (D',), (H',) and (W',), along its axes. Between voxels
            of `x`, scores are interpolated linearly. None labels the voxels of `x`.
        overlap: Share of a window that the next one covers again, 0 to below 1.
        batch_size: Windows at a time.
        progress: Called with windows done and windows in all.
        band_bytes: How large a band of scores may be; at least a window's height is taken.

    Returns:
        (D', H', W') uint8, or int16 for more than 256 classes, on the CPU; the same whatever `band_bytes` is. Voxels
        outside of `x` have 0.

    Raises:
        ValueError: For an overlap outside [0, 1), or a batch of no windows.
    """
    sides = x.shape[1:]
    places = places or [torch.arange(side).double() for side in sides]
    axes = [_Axis.of(place, side) for place, side in zip(places, sides, strict=True)]
    labels = torch.zeros(*(len(axis.inside) for axis in axes), dtype=label_type(model.num_classes))
    grid_size = covering_grid(sides, model.patch_size, model.grid_size)
    windows = list(cover(grid_size, model.grid_size, overlap=overlap))
    row_bytes = 4 * (model.num_classes + 1) * (model.img_size[0] + 1) * sides[2]
    rows = max(band_bytes // row_bytes - 1, model.img_size[1])
    strips = [slice(max(start - 1, 0), min(start + rows, sides[1])) for start in range(0, sides[1], rows)]
    jobs = [
        (strip, [window for window in windows if _reaches(to_voxels(window, model.patch_size)[1], strip)])
        for strip in strips
    ]
    done, total = 0, sum(len(inside) for _, inside in jobs)
    weight = compute_importance_map(model.img_size, mode="gaussian")
    fill, parameter = float(x.min()), next(model.parameters())
    with evaluating(model):
        for strip, inside in jobs:
            band = _Band(labels, sides, axes, strip, num_classes=model.num_classes, depth=model.img_size[0])
            for batch in in_batches(inside, batch_size):
                crops = torch.stack([crop_window(x, window, model.patch_size, fill=fill) for window in batch])
                scores = model(crops.to(parameter)).float().cpu()  # (B, K, *img_size)
                for window, part in zip(batch, scores, strict=True):
                    band.add(to_voxels(window, model.patch_size), part.mul_(weight), weight)
                done += len(batch)
                if progress:
                    progress(done, total)
            band.finish()
    return labels


class _Axis(NamedTuple):
    """Between which two voxels of a volume some others lie, along one axis: (n,) each.

    Attributes:
        inside: Whether they lie in one of its voxels.
        lower: The last voxel not after them.
        upper: The next one; the same where they lie on that.
        share: Of the next one.
    """

    inside: Tensor
    lower: Tensor
    upper: Tensor
    share: Tensor

    @classmethod
    def of(cls, place: Tensor, side: int) -> _Axis:
        within = place.clamp(0, side - 1)
        return cls(is_within(place, side), within.floor().long(), within.ceil().long(), within.frac().float())

    def between(self, start: int, stop: int) -> Tensor:
        """The numbers of those inside that need voxels of the volume before `stop`, and not only before `start`."""
        return (self.inside & (self.upper >= start) & (self.upper < stop)).nonzero()[:, 0]

    def take(self, numbers: Tensor, *, first: int = 0) -> _Axis:
        """Some of them, between voxels that are counted from `first` on."""
        inside, lower, upper, share = (each[numbers] for each in self)
        return _Axis(inside, lower - first, upper - first, share)


class _Band:
    """Sums of scores over some slices of a strip of H, from which labels are made as soon as nothing will be added.

    Args:
        labels: (D', H', W'), where what is settled is written.
        sides: D, H and W.
        axes: Where the voxels to label lie along them.
        strip: Rows of H. Those to label which need the first one only were labelled with the strip before.
        num_classes: K.
        depth: Slices that a window has.
    """

    def __init__(
        self, labels: Tensor, sides: Size, axes: Sequence[_Axis], strip: slice, *, num_classes: int, depth: int
    ) -> None:
        self.labels, self.sides, self.strip, self.slices = labels, sides, strip, axes[0]
        self.there = axes[1].between(strip.start + (strip.start > 0), strip.stop), axes[2].between(0, sides[2])
        self.rows, self.columns = axes[1].take(self.there[0], first=strip.start), axes[2].take(self.there[1])
        size = depth + 1, strip.stop - strip.start, sides[2]  # the last slice that is settled is kept, for the next
        self.sums, self.weights = torch.zeros(num_classes, *size), torch.zeros(size)
        self.first = self.settled = 0  # the first slice here, and the first that is not settled

    def add(self, voxels: Window, scores: Tensor, weight: Tensor) -> None:
        """Adds the scores (K, d, h, w) of a window, which starts no earlier along D than those before it.

        Args:
            voxels: Of the window.
            scores: Times `weight`.
            weight: (d, h, w).
        """
        d, h, w = voxels
        if d.start > self.settled:
            self._settle(d.start)
        # What of the window lies in the strip and inside of the volume.
        low, high = max(h.start, self.strip.start), min(h.stop, self.strip.stop)
        stop = min(w.stop, self.sides[2])
        there = (
            slice(d.start - self.first, d.stop - self.first),
            slice(low - self.strip.start, high - self.strip.start),
            slice(w.start, stop),
        )
        here = slice(None), slice(low - h.start, high - h.start), slice(stop - w.start)
        self.sums[:, *there] += scores[:, *here]
        self.weights[there] += weight[here]

    def finish(self) -> None:
        """Labels what is left."""
        self._settle(self.sides[0])

    def _settle(self, stop: int) -> None:
        """Labels what needs no slices but those before `stop`, and drops all of these but the last."""
        # Slice by slice, because max makes integers of eight bytes; argmax takes five times as long.
        best = [_highest(self.sums[:, i], self.labels.dtype) for i in range(stop - self.first)]
        for number in self.slices.between(self.settled, stop):
            self._label(number, best)
        past = stop - 1 - self.first
        for plane in (*self.sums, self.weights):  # one after the other, as it takes a copy
            plane.copy_(plane.roll(-past, dims=0))
            plane[len(plane) - past :] = 0
        self.first, self.settled = stop - 1, stop

    def _label(self, number: Tensor, best: Sequence[Tensor]) -> None:
        """Labels a slice, given the labels (rows, W) of the slices of the volume that are here."""
        place, rows, columns = self.slices.take(number, first=self.first), self.rows, self.columns
        # Where all neighbours have one class, so has what lies between them, as its score is the highest at each.
        least, greatest = (_around(best, place, rows, columns, extreme) for extreme in (torch.minimum, torch.maximum))
        mixed, step = (least != greatest).nonzero(), max(1, CHUNK // len(self.sums))
        for start in range(0, len(mixed), step):
            i, j = mixed[start : start + step].unbind(1)
            least[i, j] = _highest(self._scores(place, rows.take(i), columns.take(j)), least.dtype)
        self.labels[number].index_put_((self.there[0][:, None], self.there[1]), least)

    def _scores(self, *places: _Axis) -> Tensor:
        """Interpolated scores (K, N) of N voxels, given where they lie along D, H and W."""
        _, height, width = self.weights.shape
        sums, weights = self.sums.flatten(1), self.weights.flatten()
        total = torch.zeros(())
        for corner in itertools.product((False, True), repeat=3):
            d, h, w = (place.upper if up else place.lower for place, up in zip(places, corner, strict=True))
            share = math.prod(place.share if up else 1 - place.share for place, up in zip(places, corner, strict=True))
            there = (d * height + h) * width + w
            total = total + sums[:, there] * (share / weights[there])
        return total


def _highest(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """The class of the highest score, from (K, ...) to (...)."""
    return scores.max(dim=0).indices.to(dtype)


def _around(best: Sequence[Tensor], d: _Axis, h: _Axis, w: _Axis, extreme: Callable[..., Tensor]) -> Tensor:
    """The least or the greatest label of the eight voxels around each to label, of one slice: (rows, columns)."""
    plane = extreme(best[d.lower], best[d.upper])
    lines = extreme(plane[h.lower], plane[h.upper])
    return extreme(lines[:, w.lower], lines[:, w.upper])


def _reaches(side: slice, strip: slice) -> bool:
    return side.start < strip.stop and side.stop > strip.start
