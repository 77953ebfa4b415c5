"""A run as data: validated, loaded from YAML, overridable by `key=value`. `Recipe` is that of pretraining.

Unknown keys are refused with the nearest known one, so that a misspelt setting never trains with a default.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medmim.errors import SpecError
from medmim.limits import read_text
from medmim.spec import Arguments, VolumeSpec
from medmim_training.precision import Precision

RECIPE_BYTES = 100_000  # ours have two thousand; PyYAML needs seconds for more
OF_TASKS = frozenset({"task", "decoder", "crops", "labels", "frozen", "head_warmup"})  # keys of no pretraining
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # of larger ones, torch's generator on a CPU drops the rest


class Section(BaseModel):
    """Base of a recipe's parts: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EncoderSection(Section):
    """Which encoder: a name of the catalog and arguments that differ from it.

    Attributes:
        position_gain: How many times as much positions count as they did in the weights that training starts from,
            which may be random (see `balance`).
    """

    name: str
    args: Arguments = Field(default_factory=dict)
    position_gain: float = Field(1.0, gt=0)


class ModelSection(EncoderSection):
    """Which encoder to pretrain.

    Attributes:
        weights: What training starts from, as `create_model` takes it: "local-dir:FOLDER", "hf-hub:org/name", a name
            with weights. Its decoder is taken over too, where it has the same. None starts anew.
        widen: Those weights are of a narrower transformer (see `widening`).
    """

    weights: str | None = None
    widen: bool = False


class MethodSection(Section):
    """Which method and its arguments (see the classes in `medmim_training.methods`)."""

    name: str
    args: Arguments = Field(default_factory=dict)


class DataSection(Section):
    """How crops are drawn from the store.

    Attributes:
        crops_per_volume: Crops taken from a volume once it is opened.
        foreground_power: A volume is drawn in proportion to its foreground voxels, at most a crop's, to this power: 1
            shows every voxel about as often, 0 every volume.
        foreground_share: Share of the crops that are around a place with foreground; all others are anywhere in the
            volume, of which much may be air.
        mirror_axes: Axes (0, 1, 2 for D, H, W) along which every other crop is mirrored; axis 0 of RAS is left-right.
        workers: Processes that read ahead; 0 reads in the training process.
    """

    crops_per_volume: Positive = 1
    foreground_power: float = Field(1.0, ge=0, le=1)
    foreground_share: float = Field(0.0, ge=0, le=1)
    mirror_axes: tuple[Literal[0, 1, 2], ...] = ()
    workers: int = Field(1, ge=0)


class OptimizerSection(Section):
    """The optimizer; no decay of biases, norms, tokens and positions.

    Attributes:
        name: Of timm's (`timm.optim.list_optimizers`).
        lr: Peak rate.
        betas: For optimizers of the Adam kind.
        momentum: For those of the SGD kind, with Nesterov's look ahead for "sgd".
        clip_grad: Norm that gradients are scaled down to.
        layer_decay: The rate of each block of the encoder is that of the block after it times this; the full one is
            its last block's, or that of a classifier behind it. None for one rate.
        lr_scale: Rates of parts of the model as multiples of `lr`, besides `layer_decay`, such as {"decoder": 5};
            a part is the start of its parameters' names.
    """

    name: str = "adamw"
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = Field(0.9, ge=0, lt=1)
    clip_grad: float = Field(1.0, gt=0)
    layer_decay: float | None = Field(None, gt=0, le=1)
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)


class ScheduleSection(Section):
    """Linear warm-up from 0, then down to `min_lr`; counted in optimizer steps.

    Attributes:
        kind: How it goes down: "cosine", half of one; "poly", the share of steps left to the power 0.9, as nnU-Net.
        min_lr: Where it ends; the optimizer's `lr` keeps the rate constant.
    """

    kind: Literal["cosine", "poly"] = "cosine"
    steps: Positive
    warmup: int = Field(0, ge=0)
    min_lr: float = Field(0.0, ge=0)


class OutputSection(Section):
    """What a run writes and how often, in optimizer steps.

    Attributes:
        checkpoint_every: In fine-tuning, the model is validated then, too, and draws a picture.
        pictures_every: In pretraining.
        keep: Newest checkpoints that stay; the best one stays besides.
        trackers: Curves for other programs, through accelerate; `metrics.jsonl` is always written.
    """

    log_every: Positive = 20
    checkpoint_every: Positive = 500
    pictures_every: Positive = 500
    keep: Positive = 2
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()


class RunRecipe(Section):
    """What every kind of recipe has.

    Attributes:
        of_tasks: Whether the packaged ones are those in the folder finetune.
        free: Keys, or sections, that a run may change when it goes on: they say how it is carried out, not what comes
            of it.
    """

    of_tasks: ClassVar[bool] = False
    free: ClassVar[tuple[str, ...]] = ()

    name: str
    summary: str

    @classmethod
    def kind_of(cls, data: dict[str, Any]) -> type[Self]:
        """The class that reads this data: a kind of recipe may have several."""
        return cls

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as it is kept beside a run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class Recipe(RunRecipe):
    """Everything that decides a pretraining run, but for the store and the folder it writes to.

    Attributes:
        batch_size: Samples of an optimizer step, over all processes.
        accumulate: Parts that a step's batch is computed in, one after the other; changes memory, not the result, but
            for which paths are dropped where an encoder drops some (`drop_path_rate`).
        ema: Decay of an exponential moving average of the weights, which is then what gets published; None for none.
        precision: Of the arithmetic, under autocast; weights are float32. "auto" is bf16 where the hardware has it.
        compile: Compiles the parts that the encoder repeats, its blocks; worth its minutes on a GPU.
    """

    free: ClassVar[tuple[str, ...]] = "data.workers", "accumulate", "output"

    model: ModelSection
    method: MethodSection
    volume: VolumeSpec
    data: DataSection = DataSection()
    batch_size: Positive
    accumulate: Positive = 1
    ema: float | None = Field(None, gt=0, lt=1)
    optimizer: OptimizerSection
    schedule: ScheduleSection
    precision: Precision = "auto"
    compile: bool = False
    output: OutputSection = OutputSection()
    seed: Seed = 0


AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)
AnySection = TypeVar("AnySection", bound=Section)


def packaged_folder(name: str) -> Path:
    """Where packaged files are, such as "recipes": beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def recipe_folder() -> Path:
    """Where the packaged recipes are."""
    return packaged_folder("recipes")


def list_recipes(kind: type[RunRecipe] = Recipe) -> list[str]:
    """Names of the packaged recipes of a kind, such as "small/vit_t_mae3d"."""
    folder = recipe_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if name.startswith("finetune/") == kind.of_tasks)


def load_recipe(name: str, overrides: list[str] | tuple[str, ...] = (), *, kind: type[AnyRecipe] = Recipe) -> AnyRecipe:
    """Reads a recipe and applies overrides.

    Args:
        name: A packaged recipe, or the path of a YAML file.
        overrides: "dotted.key=value", the value in YAML: "optimizer.lr=3e-4".
        kind: What it must be.

    Raises:
        SpecError: For a missing recipe, an unknown key (with the nearest known ones) or an impossible value.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else recipe_folder() / f"{name}.yaml"
    if not path.is_file():
        known = list_recipes(kind)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise SpecError(f"there is no recipe {name!r}; nearest: {', '.join(near or known)}")
    data = parse_yaml(read_text(path, RECIPE_BYTES), source=str(path))
    if not isinstance(data, dict):
        raise SpecError(f"{path}: a recipe is a mapping of keys to values")
    _check_purpose(data, kind, source=str(path))
    return make_settings(data, overrides, kind=kind.kind_of(data), source=str(path))


def _check_purpose(data: dict[str, Any], kind: type[RunRecipe], *, source: str) -> None:
    """Refuses a recipe of the other command, of which the first key that differs would be called wrong."""
    of_tasks = False if "method" in data else not OF_TASKS.isdisjoint(data) or kind.of_tasks
    if of_tasks == kind.of_tasks:
        return
    is_for, command = ("fine-tuning", "finetune") if of_tasks else ("pretraining", "pretrain")
    raise SpecError(
        f"{source}: is a recipe for {is_for}, for `medmim-train {command}`; what this needs are "
        f"{', '.join(list_recipes(kind))}"
    )


def make_settings(
    data: dict[str, Any], overrides: list[str] | tuple[str, ...], *, kind: type[AnySection], source: str
) -> AnySection:
    """Validates plain data after overrides.

    Args:
        data: Changed in place.
        overrides: See `load_recipe`, as the errors.
        kind: What it must be.
        source: Named in the errors.
    """
    for override in overrides:
        _override(data, override)
    try:
        # Records within, such as `volume`, pass unknown keys over where a newer medmim may have written them.
        return kind.model_validate(data, extra="forbid")
    except ValidationError as error:
        raise SpecError(f"{source}: {explain(error, kind)}") from None


class _Loader(yaml.SafeLoader):
    """Plain data without aliases, of which a few lines can unfold to more than any memory holds."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"*{self.peek_event().anchor}: aliases are not read, write the value out")
        return super().compose_node(parent, index)


def parse_yaml(text: str, *, source: str) -> Any:
    """Plain data from YAML; `source` names where it is from in the error.

    Raises:
        SpecError: For text that is no YAML, or has aliases.
    """
    try:
        return yaml.load(text, _Loader)
    # Of a date that does not exist or a number of too many digits, PyYAML lets the constructor's ValueError through.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from None


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise SpecError(f"{override!r} is no override; write key=value, such as optimizer.lr=3e-4")
    value = parse_yaml(text, source=repr(override))
    *sections, last = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise SpecError(f"{override!r}: {section!r} is a value, not a section")
    # YAML 1.1 reads 3e-4 (no dot) as text; pydantic turns it into a number where a number is expected.
    data[last] = value


def explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first thing that is wrong, with the nearest known key where one is unknown."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg']}"
    section: Any = kind
    for part in first["loc"][:-1]:
        section = _below(section, part)
    known = list(section.model_fields)
    near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
    return f"{where} is no key of a recipe; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


def _below(section: Any, part: int | str) -> Any:
    """The type of what stands at `part` of a value of the type `section`, as pydantic names places in its errors."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        return _plain(section.model_fields[part].annotation)
    if get_origin(section) is dict:  # whose keys are names of the file's own
        return _plain(get_args(section)[-1])
    # Of several records, pydantic names the one that is meant by its kind.
    return next(each for each in get_args(section) if each.model_fields["kind"].default == part)


def _plain(annotation: Any) -> Any:
    """A type without what is said of it, and without None."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    given = [each for each in get_args(annotation) if each is not NoneType]
    is_optional = get_origin(annotation) in (Union, UnionType) and len(given) == 1
    return _plain(given[0]) if is_optional else annotation
