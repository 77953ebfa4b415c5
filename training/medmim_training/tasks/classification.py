"""Fine-tuning for classification: whole volumes, weighted cross entropy, validation by the area under the ROC curve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmim.cohort import class_columns
from medmim.errors import SpecError
from medmim.factory import create_model
from medmim.files import write_csv
from medmim.heads.segmenter import Segmenter
from medmim.inference import evaluating
from medmim.tasks import name_classes
from medmim.transforms import create_transform
from medmim_training.balance import raise_positions
from medmim_training.tasks import loop
from medmim_training.tasks.cases import Split
from medmim_training.tasks.crops import ChangedVolumes
from medmim_training.tasks.labelled import find_labelled
from medmim_training.tasks.metrics import ClassScores, score_classes
from medmim_training.tasks.recipe import ClassificationRecipe


@dataclass(frozen=True, kw_only=True)
class Validation(ClassScores, loop.Validation):
    """How well the validation cases are classified after some steps."""

    step: int

    @property
    def quality(self) -> float:
        return self.auc


def build_classifier(recipe: ClassificationRecipe, classes: Sequence[str]) -> nn.Module:
    """The recipe's network; the same weights for the same seed.

    Raises:
        SpecError: When it is that of a segmenter.
    """
    torch.manual_seed(recipe.seed)
    settings = recipe.model
    model = create_model(settings.name, settings.pretrained, **{**settings.args, "num_classes": len(classes)})
    if isinstance(model, Segmenter):
        raise SpecError(f"{settings.name} is a segmenter; name an encoder or a classifier")
    raise_positions(model, settings.position_gain)
    name_classes(model, classes, volume=recipe.trained_volume(recipe.volume or model.spec.volume))
    return model


def check_classes(split: Split, classes: Sequence[str], *, source: str) -> None:
    """Refuses a split with which classes cannot be learned or told apart.

    Raises:
        SpecError: When nobody of a class trains, or all that validate are of one.
    """
    missing = set(range(len(classes))) - {case.label for case in split.training}
    if missing:
        raise SpecError(f"{source}: no training case is of the class {classes[min(missing)]!r}; take more labels")
    if len({case.label for case in split.validation}) < 2:
        raise SpecError(f"{source}: all cases that validate are of one class; choose another fold")


class ClassificationTask(loop.Task):
    """A classifier and volumes with a class each (see `loop.Task`)."""

    def __init__(self, recipe: ClassificationRecipe) -> None:
        self.recipe = recipe
        cases, self.classes = find_labelled(recipe.data, recipe.splits, recipe.classes)
        self.split = loop.split_of(recipe, cases)
        check_classes(self.split, self.classes, source=recipe.data)
        self.model = build_classifier(recipe, self.classes)
        pool = getattr(self.model, "attn_pool", None)
        self.head = (self.model.get_classifier(), *([pool] if pool is not None else []))
        # A rare class counts as much as a common one.
        counts = np.bincount([case.label for case in self.split.training], minlength=len(self.classes))
        self.weights = torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)

    def load(self) -> None:
        transform = create_transform(self.model, modality=self.recipe.modality)
        self.training, self.validation = (
            [transform(case.image).as_tensor() for case in cases]
            for cases in (self.split.training, self.split.validation)
        )

    def samples(self, length: int) -> ChangedVolumes:
        return ChangedVolumes(
            self.training,
            [case.label for case in self.split.training],
            length=length,
            seed=self.recipe.seed,
            settings=self.recipe.crops,
        )

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        weight = self.weights.to(outputs.device)
        # Not torch's weighted mean, which divides by the weights of the batch: in a batch of one class they do nothing.
        return F.cross_entropy(outputs, batch["class"], weight=weight, reduction="none").mean()

    def validate(self, step: int, pictures: Path) -> Validation:
        truth = np.array([case.label for case in self.split.validation])
        return Validation(step=step, **asdict(score_classes(truth, self._probabilities())))

    def _probabilities(self) -> np.ndarray:
        """Of each class, for each case that validates: (n, K)."""
        batches = self._validation_batches()
        with evaluating(self.model), torch.inference_mode():
            return torch.cat([self.model(x).float().softmax(dim=1).cpu() for x in batches]).numpy()

    def _validation_batches(self) -> Iterator[Tensor]:
        device = next(self.model.parameters()).device
        for start in range(0, len(self.validation), self.recipe.batch_size):
            yield torch.stack(self.validation[start : start + self.recipe.batch_size]).to(device)

    def write_scores(self, path: Path) -> None:
        rows = (
            (case.name, self.classes[case.label], *(f"{each:.6g}" for each in row))
            for case, row in zip(self.split.validation, self._probabilities().tolist(), strict=True)
        )
        own = ("case", "label")
        write_csv(path, (*own, *class_columns(self.classes, beside=own)), rows)
