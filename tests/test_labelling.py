"""Labels of a volume from windows: the same as without windows, and between its voxels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map
from scipy.ndimage import map_coordinates

from medmim import labelling
from medmim.labelling import predict_labels
from medmim.windows import cover, covering_grid, crop_window, to_voxels
from segmenters import Random, Thresholds, noise


@pytest.mark.parametrize("shape", [(70, 90, 30), (32, 48, 16), (5, 100, 17)])
@pytest.mark.parametrize("band_bytes", [10**9, 1])
def test_a_network_that_sees_one_voxel_labels_as_without_windows(shape, band_bytes):
    x, model = noise(*shape), Thresholds().train()
    labels = predict_labels(model, x, overlap=0.4, batch_size=3, band_bytes=band_bytes)
    assert model.training
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, (x[0] * 2).round().to(torch.uint8))


def mean_scores(model: Random, x: torch.Tensor) -> torch.Tensor:
    """Scores (K, D, H, W), the mean over all windows with Gaussian weights, kept for the whole volume."""
    grid = covering_grid(x.shape[1:], model.patch_size, model.grid_size)
    size = [g * p for g, p in zip(grid, model.patch_size, strict=True)]
    sums, total = torch.zeros(model.num_classes, *size), torch.zeros(size)
    weight = compute_importance_map(model.img_size, mode="gaussian")
    with torch.inference_mode():
        for window in cover(grid, model.grid_size, overlap=0.5):
            crop = crop_window(x, window, model.patch_size, fill=float(x.min()))
            sums[:, *to_voxels(window, model.patch_size)] += weight * model(crop[None]).squeeze(0)
            total[to_voxels(window, model.patch_size)] += weight
    return (sums / total)[:, : x.shape[1], : x.shape[2], : x.shape[3]]


BANDS = [10**9, 4 * 6 * 33 * 24 * 50, 1]


@pytest.mark.parametrize("band_bytes", BANDS)
def test_labels_are_those_of_the_weighted_mean_over_all_windows(band_bytes):
    x, model = noise(40, 70, 24), Random(num_classes=5).eval()
    progress = []
    labels = predict_labels(model, x, band_bytes=band_bytes, progress=lambda *args: progress.append(args))
    assert torch.equal(labels.long(), mean_scores(model, x).argmax(dim=0))
    assert progress[-1][0] == progress[-1][1] == len(progress)
    assert len(labels.unique()) == 5


PLACES = {
    "finer": [torch.arange(98) * 0.4 + 0.1, torch.arange(145) * 0.48 - 0.4, torch.arange(25) * 0.95],
    "coarser": [torch.arange(13) * 3.1, torch.arange(30) * 2.3 + 0.5, torch.arange(6) * 4.7],
    "flipped": [39 - torch.arange(52) * 0.75, 69.3 - torch.arange(70), torch.arange(36) * 0.66],
    "larger, moved": [torch.arange(60) * 1.0 - 9.5, torch.arange(60) * 2.0 - 20, torch.arange(20) - 7.25],
    "elsewhere": [torch.arange(4) - 90.0, torch.arange(5) * 1.0, torch.arange(6) * 1.0],
}


@pytest.mark.parametrize("band_bytes", BANDS)
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_labels_between_voxels_are_those_of_the_interpolated_scores(places, band_bytes):
    x, model = noise(40, 70, 24), Random(num_classes=5).eval()
    # Neighbours mostly of one class, as in a scan, so that both ways of finding a label have their part.
    x = torch.nn.functional.avg_pool3d(x, 7, stride=1, padding=3)
    labels = predict_labels(model, x, places=places, band_bytes=band_bytes)
    points = torch.stack(torch.meshgrid(*places, indexing="ij"))
    scores = torch.stack(
        [torch.from_numpy(map_coordinates(each, points, order=1, mode="nearest")) for each in mean_scores(model, x)]
    )
    sides = torch.tensor(x.shape[1:])[:, None, None, None]
    inside = ((points > -0.501) & (points < sides - 0.499)).all(dim=0)
    first, second = scores.topk(2, dim=0).values
    sure = ~inside | (first - second > 1e-5)
    assert sure.float().mean() > 0.99
    assert torch.equal(labels[sure].long(), (scores.argmax(dim=0) * inside)[sure])


def test_a_border_runs_where_the_scores_cross_and_not_along_the_voxels():
    """A ball of 10 voxels, given by scores that are its distance from the border, on voxels of a quarter."""
    x = torch.stack(torch.meshgrid(*[torch.arange(32.0)] * 3, indexing="ij")).sub(15.3).norm(dim=0)[None] / 20
    quarters = torch.arange(-0.375, 31.5, 0.25)
    labels = predict_labels(Thresholds(num_classes=2), x, places=[quarters] * 3)  # equal scores at a quarter
    truth = torch.stack(torch.meshgrid(*[quarters] * 3, indexing="ij")).sub(15.3).norm(dim=0) >= 5
    around = quarters.round().long()
    nearest = predict_labels(Thresholds(num_classes=2), x)[np.ix_(around, around, around)]
    wrong, coarsely_wrong = ((each != truth).sum() for each in (labels, nearest))
    assert wrong < 0.25 * coarsely_wrong


def test_many_classes_and_a_wrong_overlap():
    model = Random(num_classes=300, img_size=(8, 16, 8)).eval()
    assert predict_labels(model, noise(8, 16, 8)).dtype == torch.int16
    with pytest.raises(ValueError, match="overlap=1"):
        predict_labels(model, noise(8, 16, 8), overlap=1)
    with pytest.raises(ValueError, match="batch_size=0"):
        predict_labels(model, noise(8, 16, 8), batch_size=0)


@pytest.mark.parametrize(("num_classes", "band_bytes"), [(3, 10**6), (3, 10**5), (40, 10**6)])
def test_scores_are_never_kept_for_the_whole_volume(num_classes, band_bytes, monkeypatch):
    model, kept = Random(num_classes=num_classes, img_size=(16, 16, 8)).eval(), []
    settle = labelling._Band._settle

    def note(band, stop):
        kept.append(band.sums.nbytes + band.weights.nbytes)
        settle(band, stop)

    monkeypatch.setattr(labelling._Band, "_settle", note)
    predict_labels(model, noise(64, 80, 40), band_bytes=band_bytes)
    least = (num_classes + 1) * 17 * 17 * 40 * 4  # of a window's depth and height, and one more
    assert max(kept) <= max(band_bytes, least) < num_classes * 64 * 80 * 40 * 4
