"""Fine-tuning, of whatever task a recipe is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from medmim_training.record import Report
from medmim_training.tasks.loop import Run, Task, Validation
from medmim_training.tasks.recipe import FineTuneRecipe, SegmentationRecipe


def finetune(
    recipe: FineTuneRecipe,
    folder: str | Path,
    *,
    watch: Callable[[Report], None] = lambda report: None,
    watch_validation: Callable[[Validation], None] = lambda validation: None,
) -> nn.Module:
    """Fine-tunes a model, or goes on, and writes everything to `folder`.

    Args:
        recipe: What to do.
        folder: See `loop.Run`, as the errors; `scores.csv` has, of each validation case, a row a class of a
            segmentation, or its class and the probabilities of a classification.
        watch: See `loop.Run.train`, as the errors.
        watch_validation: Likewise.

    Returns:
        The model that was best in validation, in evaluation mode.

    Raises:
        SpecError: For data, splits or settings that cannot be used.
    """
    return Run(_task_of(recipe), folder).train(watch, watch_validation)


def _task_of(recipe: FineTuneRecipe) -> Task:
    if isinstance(recipe, SegmentationRecipe):
        from medmim_training.tasks.segmentation import SegmentationTask

        return SegmentationTask(recipe)
    from medmim_training.tasks.classification import ClassificationTask

    return ClassificationTask(recipe)
