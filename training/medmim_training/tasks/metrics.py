"""How well a task is done, with intervals from resampled cases.

Segmentation: Dice and the 95th percentile of the Hausdorff distance, for each class of each case. Classification: the
area under the ROC curve, balanced accuracy and accuracy, over all cases.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from monai.metrics import compute_hausdorff_distance
from scipy.stats import rankdata
from torch import Tensor

RESAMPLES = 2000
CHUNKS = 20  # in which they are scored, for the memory that all predictions times as many take


@dataclass(frozen=True)
class Score:
    """One class of one case.

    Attributes:
        dice: Twice the common voxels over the voxels of both; NaN where neither has the class.
        hd95: In mm; NaN where neither has the class or it was not asked for, the diagonal of the volume where one of
            them lacks it.
    """

    case: str
    label: str
    dice: float
    hd95: float


def score_case(
    name: str,
    prediction: Tensor,
    truth: Tensor,
    *,
    classes: Sequence[str],
    spacing: tuple[float, float, float],
    distances: bool = True,
) -> list[Score]:
    """Scores each class but the background.

    Args:
        name: Of the case.
        prediction: (D, H, W) labels.
        truth: (D, H, W) labels.
        classes: Names by label.
        spacing: In mm along (D, H, W).
        distances: Whether to measure HD95.
    """
    diagonal = math.dist((0, 0, 0), [side * step for side, step in zip(truth.shape, spacing, strict=True)])
    scores = []
    for label, class_name in enumerate(classes[1:], start=1):
        ours, theirs = prediction == label, truth == label
        sizes = int(ours.sum()), int(theirs.sum())
        if not any(sizes):
            dice = hd95 = math.nan
        elif not all(sizes):
            dice, hd95 = 0.0, diagonal if distances else math.nan
        else:
            dice = 2 * int((ours & theirs).sum()) / sum(sizes)
            hd95 = _hd95(ours, theirs, spacing) if distances else math.nan
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


# --- classification ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassScores:
    """How well classes are told apart, each with its 95 % interval from resampled cases.

    Attributes:
        auc: Area under the ROC curve of each class against all others, mean over the classes.
        balanced_accuracy: Share of each class that is found, mean over the classes.
        accuracy: Share of the cases that are right.
    """

    auc: float
    auc_interval: tuple[float, float]
    balanced_accuracy: float
    balanced_accuracy_interval: tuple[float, float]
    accuracy: float
    accuracy_interval: tuple[float, float]

    def __str__(self) -> str:
        (low, high), balanced = self.auc_interval, self.balanced_accuracy
        return f"AUC {self.auc:.4f} ({low:.4f} to {high:.4f}), balanced accuracy {balanced:.4f}"


def score_classes(truth: np.ndarray, probabilities: np.ndarray, *, seed: int = 0) -> ClassScores:
    """Scores the predictions of some cases; classes that none of them has do not count.

    Args:
        truth: (n,) numbers of classes; two at least are there.
        probabilities: (n, K).
        seed: Decides what is drawn for the intervals.
    """
    draws = np.random.default_rng(seed).integers(len(truth), size=(RESAMPLES, len(truth)))
    scores = {}
    metrics = {"auc": area_under_curve, "balanced_accuracy": _balanced_accuracy, "accuracy": _accuracy}
    for name, metric in metrics.items():
        resampled = np.concatenate([metric(truth[some], probabilities[some]) for some in np.array_split(draws, CHUNKS)])
        low, high = np.nanpercentile(resampled, (2.5, 97.5))  # NaN where only one class was drawn
        scores |= {name: float(metric(truth, probabilities)), f"{name}_interval": (float(low), float(high))}
    return ClassScores(**scores)


def area_under_curve(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The `auc` of `ClassScores`, from ranks (Mann and Whitney), for (..., n) and (..., n, K) at once: (...,)."""

    def of_class(label: int) -> np.ndarray:
        inside = truth == label
        ranks = rankdata(probabilities[..., label], axis=-1)
        number = inside.sum(axis=-1)
        above = (ranks * inside).sum(axis=-1) - number * (number + 1) / 2
        return _over(above, number * (truth.shape[-1] - number))

    classes = probabilities.shape[-1]
    return _mean_over_classes(of_class, range(classes) if classes > 2 else (1,))  # of two, either says the same


def _balanced_accuracy(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    right = probabilities.argmax(axis=-1) == truth

    def of_class(label: int) -> np.ndarray:
        inside = truth == label
        return _over((right & inside).sum(axis=-1), inside.sum(axis=-1))

    return _mean_over_classes(of_class, range(probabilities.shape[-1]))


def _accuracy(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    return (probabilities.argmax(axis=-1) == truth).mean(axis=-1)


def _over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Their ratio; NaN for a whole of 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean_over_classes(of_class: Callable[[int], np.ndarray], classes: Iterable[int]) -> np.ndarray:
    """The mean over the classes that have a value; NaN where none has."""
    values = np.stack([of_class(label) for label in classes])
    there = ~np.isnan(values)
    return _over(np.where(there, values, 0).sum(axis=0), there.sum(axis=0))
