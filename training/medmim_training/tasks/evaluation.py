"""The last evaluation of a fine-tuned segmenter: in the scan's own voxels, on cases that it was not trained on.

During a run, validation is on the network's grid, where it is cheap. A figure to be reported is measured here instead,
so that runs at different spacings are compared by the same voxels: those that were labelled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from medmim.errors import SpecError
from medmim.factory import from_pretrained
from medmim.files import write_text
from medmim.heads.segmenter import Segmenter
from medmim.labels import check_labels_place
from medmim.limits import LIST_BYTES, read_json
from medmim.segmentation import segment, segmented_classes
from medmim.spec import Modality
from medmim_training.engine import RECIPE_FILE
from medmim_training.recipe import load_recipe
from medmim_training.tasks.cases import MEAN, Case, find_cases, load_labels, split_cases
from medmim_training.tasks.loop import MODEL, SPLIT_FILE
from medmim_training.tasks.metrics import Score, bootstrap_interval, mean_of_cases, score_case
from medmim_training.tasks.peers import register_peers
from medmim_training.tasks.recipe import FineTuneRecipe, SegmentationRecipe
from medmim_training.tasks.segmentation import write_scores

Side = Literal["validation", "test"]


@dataclass(frozen=True)
class Mean:
    """A mean over cases, and its 95 % interval from resampled ones; NaN where no case has a value."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Mean:
        return cls(float(values.mean()) if len(values) else float("nan"), *bootstrap_interval(values))


def evaluate_run(
    run: str | Path, side: Side = "test", *, report: Callable[[str, str | None], None] = lambda name, problem: None
) -> list[Score]:
    """Scores the best model of a finished fine-tuning run on the cases that its recipe keeps for it.

    Args:
        run: Folder that `finetune` wrote.
        side: "test", or the fold that chose the best model.
        report: Called with each case's name and None.

    Raises:
        SpecError: For a run that is not finished or not of segmentation, or data without such cases.
        ScanError: For a case that cannot be read.
    """
    run = Path(run)
    if not run.is_dir():
        raise SpecError(f"{run}: no such folder; give that of a run of `medmim-train finetune`")
    if not (run / MODEL).is_dir():
        raise SpecError(f"{run}: no finished run ({MODEL} is missing); `medmim-train finetune` goes on with it")
    recipe = load_recipe(str(run / RECIPE_FILE), kind=FineTuneRecipe)
    if not isinstance(recipe, SegmentationRecipe):
        raise SpecError(
            f"{run}: is a run of {recipe.task}, and only segmentation is measured so; `medmim classify` gives the "
            "probabilities of each scan"
        )
    cases = cases_of(recipe, side)
    _check_unseen(run / SPLIT_FILE, cases, side)
    register_peers()
    model = from_pretrained(run / MODEL, device="cuda" if torch.cuda.is_available() else None)
    return evaluate_segmenter(model, cases, modality=recipe.modality, overlap=recipe.overlap, report=report)


def _check_unseen(path: Path, cases: Sequence[Case], side: Side) -> None:
    """Refuses cases that the run trained on, or for the test chose its best model by, since the data was changed."""
    sides = read_json(path, LIST_BYTES)
    seen = {*sides["training"], *(sides["validation"] if side == "test" else ())}
    leaked = next((case.name for case in cases if case.name in seen), None)
    if leaked:
        raise SpecError(f"{path}: the run has seen {leaked}, which the data now keeps for {side}; put the data back")


def cases_of(recipe: SegmentationRecipe, side: Side) -> tuple[Case, ...]:
    """The cases of one side of a recipe's split.

    Raises:
        SpecError: When there are none.
    """
    source = recipe.splits or recipe.data
    cases = getattr(split_cases(find_cases(recipe.data, recipe.splits), recipe.fold, source=source), side)
    if not cases:
        raise SpecError(f"{source}: no case is for {side}; give some the split {side} in a split file")
    return cases


def evaluate_segmenter(
    model: Segmenter,
    cases: Sequence[Case],
    *,
    modality: Modality | None = None,
    overlap: float = 0.5,
    report: Callable[[str, str | None], None] = lambda name, problem: None,
) -> list[Score]:
    """Dice and HD95 of each class of each case, in the scan's own voxels.

    Args:
        model: From `create_segmenter` or `from_pretrained`.
        cases: Scans with labels.
        modality: Of the scans; None takes it from each.
        overlap: Of the windows.
        report: Called with each case's name and None.

    Raises:
        ScanError: For a case that cannot be read, or labels that do not lie on their scan.
    """
    classes, scores = segmented_classes(model), []
    for case in cases:
        found = segment(model, case.image, modality=modality, overlap=overlap)
        truth = load_labels(case.label, num_classes=len(model.spec.task.classes))
        check_labels_place(truth, shape=found.labels.shape, affine=found.affine)
        ours, theirs = (
            torch.from_numpy(np.ascontiguousarray(each, np.int16)) for each in (found.labels, truth.array[0])
        )
        scores += score_case(case.name, ours, theirs, classes=classes, spacing=truth.spacing)
        report(case.name, None)
    return scores


def means_of(scores: Sequence[Score]) -> dict[str, dict[str, Mean]]:
    """Means over cases of each class, and under `MEAN` those of the cases' means over classes: by class and metric."""
    by_class: dict[str, list[Score]] = {}
    for score in scores:
        by_class.setdefault(score.label, []).append(score)
    by_class[MEAN] = list(scores)
    return {
        label: {metric: Mean.of(mean_of_cases(chosen, metric)) for metric in ("dice", "hd95")}
        for label, chosen in by_class.items()
    }


def means_file(folder: Path, side: Side) -> Path:
    """Where `write_evaluation` writes the means."""
    return folder / f"{side}.json"


def write_evaluation(folder: Path, scores: Sequence[Score], side: Side) -> tuple[Path, Path]:
    """Writes `SIDE.csv`, a row a case and class, and `SIDE.json`, the means and their protocol; gives both paths."""
    table, means = folder / f"{side}.csv", means_file(folder, side)
    write_scores(table, scores)
    write_text(means, json.dumps(_as_data(scores, side), indent=1) + "\n")
    return table, means


def _as_data(scores: Sequence[Score], side: Side) -> dict[str, Any]:
    return {
        "side": side,
        "cases": len({score.case for score in scores}),
        "protocol": "the scan's own voxels; mean over cases of that over classes; 95 % interval from resampled cases; "
        "a class that only one of labels and prediction has counts as Dice 0 and HD95 the scan's diagonal",
        "results": {
            label: {metric: [_short(m.value), _short(m.low), _short(m.high)] for metric, m in metrics.items()}
            for label, metrics in means_of(scores).items()
        },
    }


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
