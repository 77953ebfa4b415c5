"""How well labels match: Dice and the 95th percentile of the Hausdorff distance, for each class of each case."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from monai.metrics import compute_hausdorff_distance
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """One class of one case.

    Attributes:
        dice: Twice the common voxels over the voxels of both; NaN where neither has the class.
        hd95: In mm; NaN where neither has the class, the diagonal of the volume where one of them lacks it.
    """

    case: str
    label: str
    dice: float
    hd95: float


def score_case(
    name: str, prediction: Tensor, truth: Tensor, *, classes: Sequence[str], spacing: tuple[float, float, float]
) -> list[Score]:
    """Scores each class but the background.

    Args:
        name: Of the case.
        prediction: (D, H, W) labels.
        truth: (D, H, W) labels.
        classes: Names by label.
        spacing: In mm along (D, H, W).
    """
    diagonal = math.dist((0, 0, 0), [side * step for side, step in zip(truth.shape, spacing, strict=True)])
    scores = []
    for label, class_name in enumerate(classes[1:], start=1):
        ours, theirs = prediction == label, truth == label
        sizes = int(ours.sum()), int(theirs.sum())
        if not any(sizes):
            dice = hd95 = math.nan
        elif not all(sizes):
            dice, hd95 = 0.0, diagonal
        else:
            dice = 2 * int((ours & theirs).sum()) / sum(sizes)
            hd95 = _hd95(ours, theirs, spacing)
        scores.append(Score(name, class_name, dice, hd95))
    return scores


def _hd95(ours: Tensor, theirs: Tensor, spacing: tuple[float, float, float]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's, about an argument that MONAI itself passes on
        return compute_hausdorff_distance(
            ours[None, None], theirs[None, None], include_background=True, percentile=95, spacing=list(spacing)
        ).item()


def mean_of_cases(scores: Sequence[Score], metric: str) -> np.ndarray:
    """The mean over the classes of each case that has a value, in the order of the cases: (cases,)."""
    values: dict[str, list[float]] = {}
    for score in scores:
        value = getattr(score, metric)
        if not math.isnan(value):
            values.setdefault(score.case, []).append(value)
    return np.array([np.mean(each) for each in values.values()])


def bootstrap_interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of (n,) values, from resampled ones (Efron's percentile interval)."""
    if not len(values):
        return math.nan, math.nan
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)
