"""What a file from outside may say: frozen, validated records of scans, models and weights.

Everything here is plain data that round-trips through JSON and TOML. Unknown keys are ignored, so that an older
medmim reads what a newer one wrote; wrong types and impossible values raise `SpecError`.

Sizes and spacings are 3-tuples over array axes (D, H, W) after reorientation to `VolumeSpec.orientation`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medmim.errors import SpecError
from medmim.limits import plain_arguments

SCHEMA_VERSION = 1

Size = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
Spacing = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
Modality = Literal["CT", "MR", "PET"]
RepositoryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]  # "org/name"
Arguments = Annotated[dict[str, Any], AfterValidator(plain_arguments)]  # of a constructor

# A path inside a folder, which means the same file on every system: no "..", no drive, no device of Windows, and
# not longer than a name may be.
_PART = r"(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|/|$))[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_-])?"
INSIDE = re.compile(rf"(?!.{{256}}){_PART}(?:/{_PART})*", re.ASCII | re.IGNORECASE)


class Record(BaseModel):
    """Base of all records: immutable, with errors that name the field instead of a traceback."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    @classmethod
    def parse(cls, data: Any, *, source: str):
        """Validates `data` (a mapping); `source` names the file in the error.

        Raises:
            SpecError: Naming the source, the field and what is wrong with it.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "(top level)"
            raise SpecError(f"{source}: {field}: {first['msg']}") from None

    def to_data(self) -> dict[str, Any]:
        """The record as JSON-ready data, without fields that are None."""
        return self.model_dump(mode="json", exclude_none=True)


# --- scans ------------------------------------------------------------------------------------------------------------


class Window(Record):
    """Clip to [low, high] (for CT: Hounsfield units), then scale to [0, 1]."""

    kind: Literal["window"] = "window"
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


class Percentile(Record):
    """Clip to two percentiles of the voxels above the volume's minimum, then scale to [0, 1]."""

    kind: Literal["percentile"] = "percentile"
    low: float = Field(0.5, ge=0, le=100)
    high: float = Field(99.5, ge=0, le=100)

    @model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


class ZScore(Record):
    """Zero mean and unit variance over the voxels above the volume's minimum."""

    kind: Literal["zscore"] = "zscore"


Intensity = Annotated[Window | Percentile | ZScore, Field(discriminator="kind")]


class VolumeSpec(Record):
    """The exact preprocessing that a set of weights expects.

    Attributes:
        orientation: Axis codes of array axes 0, 1, 2, for example "RAS" (nibabel's convention: towards Right, ...).
        spacing: Voxel size in mm along the same axes; None keeps each scan's own.
        intensity: One rule for each modality the weights were trained on.
    """

    orientation: str = "RAS"
    spacing: Spacing | None = None
    intensity: dict[Modality, Intensity] = Field(min_length=1)

    @field_validator("orientation")
    @classmethod
    def _axis_codes(cls, value: str) -> str:
        if len(value) != 3 or any(sum(code in pair for code in value) != 1 for pair in ("LR", "PA", "IS")):
            raise ValueError(f"{value!r} needs one letter of each pair L/R, P/A, I/S")
        return value

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.intensity)


# --- weights ----------------------------------------------------------------------------------------------------------


class FileSpec(Record):
    """One file of a model folder: its name inside the folder, its sha256 and its size in bytes."""

    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(gt=0)

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        if not INSIDE.fullmatch(value):
            raise ValueError(f"{value!r} must be a path inside the model folder, of letters, digits, '_', '-' and '.'")
        return value


class DataSource(Record):
    """One collection of training volumes, as a card lists it."""

    name: str
    volumes: int = Field(gt=0)
    modality: str
    license: str


class TrainingRecord(Record):
    """What a pretraining run was and what it cost; copied from the run's own record.

    Attributes:
        crops: Samples seen; one of SimCLR is a pair of overlapping crops.
        cpu_hours: Of all its processes.
        data: What it was trained on; a run `before` another that is written without has that of the later one.
        before: The record of the weights that it started from; None when it started anew.
        widened: Whether those are of a narrower network, whose channels were copied.
    """

    method: str
    recipe: str
    steps: int = Field(gt=0)
    crops: int = Field(gt=0)
    volumes: int = Field(gt=0)
    wall_hours: float = Field(ge=0)
    cpu_hours: float = Field(ge=0)
    hardware: str
    final_loss: float
    date: str
    data: tuple[DataSource, ...] = Field(min_length=1)
    before: TrainingRecord | None = None
    widened: bool = False

    @property
    def runs(self) -> tuple[TrainingRecord, ...]:
        """The runs that the weights went through, the first one first."""
        return (*(self.before.runs if self.before else ()), self)

    @model_validator(mode="before")
    @classmethod
    def _same_data(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "data" in values and isinstance(values.get("before"), Mapping):
            return {**values, "before": {"data": values["data"], **values["before"]}}
        return values


class Evidence(Record):
    """One measured number: on what, by which protocol, beside which baselines."""

    dataset: str
    protocol: str
    metric: str
    value: float
    baselines: dict[str, float] = Field(default_factory=dict)
    cases: int = Field(gt=0)


class PartSpec(Record):
    """A module beside the encoder (of pretraining, or of a segmenter): its kind and constructor arguments."""

    kind: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    args: Arguments = Field(default_factory=dict)


class WeightsSpec(Record):
    """One set of weights: where it is, how to check it, what it is licensed as, what it needs and what it showed.

    Attributes:
        tag: Names the training data, `[a-z0-9_]+`; the full name is `architecture.tag`. That of a fine-tuned model is
            made of the tag that it started from and its task.
        repo: Hub repository "org/name"; None for weights that were never published.
        revision: The 40-hex commit that the digests belong to; None until published.
        encoder: The safetensors file, or all shards of it in order.
        decoder: The pretraining decoder and what builds it (`decoder_spec`), when published.
        golden: Seeded input and the outputs these weights gave for it.
        license: SPDX identifier, the strictest of the training data.
        converter: Name of a function in `medmim.convert` when the file is in a foreign layout.
        base_model: Repository of the weights that these were trained on from, for the card of a fine-tuned model.
    """

    tag: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    repo: RepositoryName | None = None
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    encoder: tuple[FileSpec, ...] = Field(min_length=1)
    decoder: FileSpec | None = None
    decoder_spec: PartSpec | None = None
    golden: FileSpec | None = None
    license: str
    citation: str
    volume: VolumeSpec
    training: TrainingRecord | None = None
    evidence: tuple[Evidence, ...] = ()
    converter: str | None = None
    base_model: RepositoryName | None = None

    @model_validator(mode="after")
    def _separate_files(self):
        if len({file.name.lower() for file in self.files}) < len(self.files):
            raise ValueError("two of the files have the same name where case does not count")
        return self

    @property
    def files(self) -> tuple[FileSpec, ...]:
        return tuple(f for f in (*self.encoder, self.decoder, self.golden) if f is not None)


# --- models -----------------------------------------------------------------------------------------------------------

NAME = re.compile(r"^[a-z][a-z0-9_]*$")


class Origin(Record):
    """Weights that a model was fine-tuned from: their full name and their licence (SPDX)."""

    name: str
    license: str


class TaskSpec(Record):
    """What a model was made to do beyond encoding.

    Attributes:
        kind: "segmentation" has an output a voxel and class, "classification" one a volume and class.
        classes: Their names in the order of the outputs; for segmentation the first is the background.
        decoder: What a segmenter has behind its encoder.
        volume: The preprocessing that it was trained with, which may differ from that of the encoder's pretraining.
        origin: The weights that it started from; None for random ones.
    """

    kind: Literal["segmentation", "classification"]
    classes: tuple[str, ...] = Field(min_length=2)
    decoder: PartSpec | None = None
    volume: VolumeSpec | None = None
    origin: Origin | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"two of the classes have the same name: {', '.join(self.classes)}")
        if (self.kind == "segmentation") != (self.decoder is not None):
            raise ValueError("a segmentation needs a decoder, a classification has none")
        return self


class ModelSpec(Record):
    """A model: its catalog name, its family (which class builds it), its arguments, the weights it holds and its task.

    This is what `config.json` stores and what `model.spec` returns.
    """

    medmim: int = Field(SCHEMA_VERSION, ge=1)
    architecture: str = Field(pattern=NAME.pattern)
    family: str = Field(pattern=NAME.pattern)
    args: Arguments = Field(default_factory=dict)
    weights: WeightsSpec | None = None
    task: TaskSpec | None = None

    @field_validator("medmim")
    @classmethod
    def _known(cls, value: int) -> int:
        if value > SCHEMA_VERSION:
            raise ValueError(f"version {value} of the format, of which this medmim knows {SCHEMA_VERSION}; update it")
        return value

    @property
    def volume(self) -> VolumeSpec | None:
        """The preprocessing that the model expects: that of its task, else that of its weights."""
        if self.task is not None and self.task.volume is not None:
            return self.task.volume
        return self.weights.volume if self.weights is not None else None

    @property
    def name(self) -> str:
        """`architecture.tag`, or the bare architecture when the model holds no known weights."""
        return f"{self.architecture}.{self.weights.tag}" if self.weights else self.architecture
