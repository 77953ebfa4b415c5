"""A fine-tuning run as data."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from medmim.spec import Modality, VolumeSpec
from medmim_training.precision import Precision
from medmim_training.recipe import (
    EncoderSection,
    OptimizerSection,
    OutputSection,
    Positive,
    RunRecipe,
    ScheduleSection,
    Section,
    Seed,
)


class StartSection(EncoderSection):
    """Which encoder to start from.

    Attributes:
        pretrained: With its weights; else from scratch.
    """

    pretrained: bool = True


class DecoderSection(Section):
    """Which decoder, and its arguments (see the classes in `medmim.heads`)."""

    name: Literal["unetr", "unet", "light", "linear"] = "unetr"
    args: dict[str, Any] = Field(default_factory=dict)


class ChangeSection(Section):
    """How training samples are changed.

    Attributes:
        rotate: Largest angle about each axis, in degrees.
        scale: Largest change of size, as a share.
        mirror_axes: Axes (0, 1, 2 for D, H, W) along which every other sample is mirrored.
        appearance: Probability of each change of intensity: noise, blur, brightness, contrast.
        workers: Processes that read ahead; 0 makes samples in the training process.
    """

    rotate: float = Field(15, ge=0, le=180)
    scale: float = Field(0.15, ge=0, lt=1)
    mirror_axes: tuple[Literal[0, 1, 2], ...] = ()
    appearance: float = Field(0.15, ge=0, le=1)
    workers: int = Field(0, ge=0)


class CropSection(ChangeSection):
    """How training crops are drawn and changed.

    Attributes:
        foreground: Share of crops around a voxel of a class drawn at random from those of the case.
    """

    foreground: float = Field(0.67, ge=0, le=1)


class FineTuneOptimizerSection(OptimizerSection):
    """The optimizer, with the longer memory that fine-tuning is done with."""

    betas: tuple[float, float] = (0.9, 0.999)


class FineTuneRecipe(RunRecipe):
    """What decides a fine-tuning run of any task, but for the folder it writes to.

    Attributes:
        task: Which kind of recipe it is.
        data: The labelled cases, see there.
        splits: A CSV file with the column `case` and any of `fold`, `split` and `subject_group`, see `with_splits`;
            None takes what the data says, such as `subjects.csv` in the folder, else five folds are drawn.
        fold: The fold that validates.
        labels: How much of the other folds is trained on: a share such as "10%", or a number of cases.
        classes: Their names by label.
        volume: Preprocessing; None is that of the encoder's weights.
        modality: What the scans are, and the model is for; None takes it from each scan.
        crops: How samples are drawn and changed.
        frozen: Trains the new parts alone, the encoder stays as it is.
        head_warmup: Steps in which the new parts are trained alone, before the encoder is too.
    """

    of_tasks: ClassVar[bool] = True
    # Validation is at each checkpoint, so how often that is decides which model is the best.
    free: ClassVar[tuple[str, ...]] = "crops.workers", "output.log_every", "output.keep"

    task: Literal["segmentation", "classification"]
    data: str
    splits: str | None = None
    fold: int = Field(0, ge=0)
    labels: str | int = "100%"
    classes: tuple[str, ...] = ()
    model: StartSection
    volume: VolumeSpec | None = None
    modality: Modality | None = None
    crops: ChangeSection = ChangeSection()
    batch_size: Positive = 2
    frozen: bool = False
    head_warmup: int = Field(0, ge=0)
    optimizer: FineTuneOptimizerSection
    schedule: ScheduleSection
    precision: Precision = "auto"
    output: OutputSection = OutputSection()
    seed: Seed = 0

    @classmethod
    def kind_of(cls, data: dict[str, Any]) -> type[FineTuneRecipe]:
        if cls is not FineTuneRecipe:
            return cls
        kinds = {"segmentation": SegmentationRecipe, "classification": ClassificationRecipe}
        task = data.get("task", "segmentation")
        return kinds.get(task, cls) if isinstance(task, str) else cls

    @field_validator("labels", mode="before")  # of two types, pydantic would say that it is not the first
    @classmethod
    def _share_or_number(cls, value: Any) -> str | int:
        if isinstance(value, str):
            try:
                share = float(value.removesuffix("%"))
            except ValueError:
                share = 0.0
            is_meant = value.endswith("%") and 0 < share <= 100
        else:
            is_meant = type(value) is int and value > 0
        if not is_meant:
            raise ValueError(f"{value!r} is neither a share such as 10% nor a number of cases above 0")
        return value

    @field_validator("output")
    @classmethod
    def _of_pretraining(cls, value: OutputSection) -> OutputSection:
        if value.trackers:
            raise ValueError("fine-tuning has no trackers; its figures are in metrics.jsonl and validation.jsonl")
        if value.pictures_every != OutputSection().pictures_every:
            raise ValueError(
                "pictures_every is of pretraining; fine-tuning draws one at each validation, every checkpoint_every"
            )
        return value

    def trained_volume(self, volume: VolumeSpec | None) -> VolumeSpec | None:
        """Preprocessing with the rule of the recipe's modality alone, where it says one: no other is trained with.

        A scan that seems to be of another modality than it is, as a CT without air, is refused then, not prepared
        otherwise than in training.
        """
        if volume is None or self.modality not in volume.intensity:
            return volume
        return volume.model_copy(update={"intensity": {self.modality: volume.intensity[self.modality]}})

    def count_labels(self, cases: int) -> int:
        """How many of this many cases are trained on; at least one."""
        if isinstance(self.labels, int):
            return min(self.labels, cases)
        return max(1, round(cases * float(self.labels.removesuffix("%")) / 100))


class SegmentationRecipe(FineTuneRecipe):
    """A fine-tuning run for segmentation.

    Attributes:
        data: A folder in the layout of the Medical Segmentation Decathlon (`imagesTr`, `labelsTr`), or a CSV file with
            the columns `image` and `label`.
        classes: Names by label, the background first; empty takes them from `dataset.json`.
        overlap: Of the windows in validation.
    """

    task: Literal["segmentation"] = "segmentation"
    decoder: DecoderSection = DecoderSection()
    crops: CropSection = CropSection()
    overlap: float = Field(0.5, ge=0, lt=1)


class ClassificationRecipe(FineTuneRecipe):
    """A fine-tuning run for classification, of whole volumes, cropped or padded around their middle.

    `model.args` may say how features are pooled (`global_pool`).

    Attributes:
        data: A CSV file with the columns `image` and `label`, a class each, or an `.npz` file of MedMNIST; see
            `find_labelled`.
        classes: Names by label; empty takes the labels themselves.
    """

    task: Literal["classification"]


class ProbeRecipe(Section):
    """What decides how frozen features are probed.

    Attributes:
        data: As for a `ClassificationRecipe`, as `splits`, `fold` and `classes`.
        volume: Preprocessing; None is that of the encoder's weights, or without them of those of its name.
        modality: What the scans are; None takes it from each scan.
        batch_size: Scans encoded at a time.
        seed: Of an encoder without weights.
    """

    data: str
    splits: str | None = None
    fold: int = Field(0, ge=0)
    classes: tuple[str, ...] = ()
    model: StartSection
    volume: VolumeSpec | None = None
    modality: Modality | None = None
    batch_size: Positive = 16
    seed: Seed = 0
