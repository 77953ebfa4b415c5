"""Fine-tuning for segmentation: crops, Dice and cross entropy, validation over whole cases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from torch import Tensor

from medmim.errors import SpecError
from medmim.files import write_csv
from medmim.heads.segmenter import Segmenter
from medmim.labelling import predict_labels
from medmim.pictures import segmentation_picture
from medmim.tasks import create_segmenter, name_classes
from medmim.transforms import VolumeTransform
from medmim_training.balance import raise_positions
from medmim_training.tasks import loop
from medmim_training.tasks.cases import LoadedCase, find_cases, find_classes, load_case, pad_around
from medmim_training.tasks.crops import LabelledCrops
from medmim_training.tasks.metrics import Score, bootstrap_interval, mean_of_cases, score_case
from medmim_training.tasks.peers import PEERS, register_peers
from medmim_training.tasks.recipe import SegmentationRecipe


@dataclass(frozen=True)
class Validation(loop.Validation):
    """How well the validation cases are segmented after some steps.

    Attributes:
        dice: Mean over cases of the mean over classes, and its 95 % interval from resampled cases.
    """

    step: int
    dice: float
    dice_interval: tuple[float, float]

    @property
    def quality(self) -> float:
        return self.dice

    def __str__(self) -> str:
        low, high = self.dice_interval
        return f"Dice {self.dice:.4f} ({low:.4f} to {high:.4f})"


def build_segmenter(recipe: SegmentationRecipe) -> Segmenter:
    """The recipe's network; the same weights for the same seed."""
    if recipe.model.name in PEERS:
        register_peers()
    torch.manual_seed(recipe.seed)
    model = create_segmenter(
        recipe.model.name,
        recipe.decoder.name,
        classes=find_classes(recipe.data, recipe.classes),
        pretrained=recipe.model.pretrained,
        decoder_args=recipe.decoder.args,
        volume=recipe.volume,
        **recipe.model.args,
    )
    raise_positions(model.encoder, recipe.model.position_gain)
    name_classes(model, model.spec.task.classes, volume=recipe.trained_volume(model.spec.volume))
    return model


class SegmentationTask(loop.Task):
    """A segmenter and labelled scans (see `loop.Task`)."""

    def __init__(self, recipe: SegmentationRecipe) -> None:
        self.recipe = recipe
        self.split = loop.split_of(recipe, find_cases(recipe.data, recipe.splits))
        self.model = build_segmenter(recipe)
        self.head = (self.model.decoder,)
        self.classes = self.model.spec.task.classes
        self.criterion = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def load(self) -> None:
        transform = VolumeTransform(
            self.model.spec.volume, (1, 1, 1), in_chans=self.model.in_chans, modality=self.recipe.modality, fit="pad"
        )
        self.training, self.validation = (
            [load_case(case, transform, num_classes=len(self.classes)) for case in cases]
            for cases in (self.split.training, self.split.validation)
        )
        there = {label for case in self.training for label in case.labels.unique().tolist()}
        missing = [name for label, name in enumerate(self.classes) if label and label not in there]
        if missing:
            raise SpecError(
                f"{self.recipe.data}: no case that trains has the class {missing[0]!r}, which cannot be learned then; "
                "train on more labels, or on others (seed=, fold=)"
            )
        if not any(case.labels.any() for case in self.validation):
            raise SpecError(f"{self.recipe.data}: no case that validates has any class but {self.classes[0]}")

    def samples(self, length: int) -> LabelledCrops:
        return LabelledCrops(
            self.training, self.model.img_size, length=length, seed=self.recipe.seed, settings=self.recipe.crops
        )

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return self.criterion(outputs, batch["labels"])

    def validate(self, step: int, pictures: Path) -> Validation:
        scores = []
        for number, (case, labels) in enumerate(self._predictions()):
            # Distances take longer than the prediction, and decide nothing.
            scores += self._score(case, labels, distances=False)
            if number == 0:
                self._draw(case, labels, step, pictures)
        dice = mean_of_cases(scores, "dice")
        return Validation(step, float(dice.mean()), bootstrap_interval(dice))

    def _predictions(self) -> Iterator[tuple[LoadedCase, Tensor]]:
        """The cases that validate, with the labels (D, H, W) that the model gives them."""
        for case in self.validation:
            x, inside = pad_around(case.x, self.model.img_size, value=float(case.x.min()))
            yield case, predict_labels(self.model, x, overlap=self.recipe.overlap)[inside]

    def _score(self, case: LoadedCase, labels: Tensor, *, distances: bool) -> list[Score]:
        return score_case(
            case.name, labels, case.labels, classes=self.classes, spacing=case.spacing, distances=distances
        )

    def _draw(self, case: LoadedCase, labels: Tensor, step: int, pictures: Path) -> None:
        segmentation_picture(
            case.x,
            {"truth": case.labels, "prediction": labels},
            pictures / f"step-{step:08d}.png",
            spacing=case.spacing,
            orientation=self.model.spec.volume.orientation,
            title=f"{case.name}, step {step}",
        )

    def write_scores(self, path: Path) -> None:
        write_scores(path, [score for found in self._predictions() for score in self._score(*found, distances=True)])


def write_scores(path: Path, scores: list[Score]) -> None:
    """Writes a CSV with a row a case and class."""
    rows = ((s.case, s.label, f"{s.dice:.6g}", f"{s.hd95:.6g}") for s in scores)
    write_csv(path, (field.name for field in fields(Score)), rows)
