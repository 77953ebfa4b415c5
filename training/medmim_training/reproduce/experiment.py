"""An experiment as data: variants of pretraining, tables of fine-tuning runs that start from them, and what they test.

Every run is a recipe with overrides, so each can be repeated by hand. A run is named after its settings and a digest of
its recipe: tables that ask for the same run share it, and a changed setting never goes on with another one's run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from medmim.errors import SpecError
from medmim.limits import read_text
from medmim.registry import is_model
from medmim.spec import Modality
from medmim_training.recipe import (
    RECIPE_BYTES,
    Positive,
    Recipe,
    RunRecipe,
    Section,
    explain,
    load_recipe,
    packaged_folder,
    parse_yaml,
)
from medmim_training.tasks.recipe import SegmentationRecipe

SCRATCH = "scratch"
PRETRAINING, FINETUNING, ENCODER = "pretraining", "finetuning", "encoder"  # folders of runs, and of what one exports
Overrides = tuple[str, ...]


class PretrainingSection(Section):
    """A recipe, and by name the overrides that make variants of it."""

    recipe: str
    variants: dict[str, Overrides]


class FineTuningSection(Section):
    """A recipe, and the overrides that all runs have."""

    recipe: str
    overrides: Overrides = ()


class Row(Section):
    """One setting of a table, run once a seed.

    Attributes:
        start: "scratch", a variant of pretraining, or a name of weights as `create_model` takes it.
        overrides: Of the fine-tuning recipe.
        against: The row that differences are taken from, seed by seed.
        same_time_as: The row for whose training time this one is trained; its number of steps follows.
    """

    start: str
    overrides: Overrides = ()
    against: str | None = None
    same_time_as: str | None = None


class Table(Section):
    """Rows that answer one question.

    Attributes:
        title: Of its section on the page.
        paper: What the paper says to it, and by which protocol.
        seeds: Runs of each row: seeds 0, 1, ...
        rows: By name.
        shows: "speed": steps to the final Dice of the row that others are compared with; "cost": time of a step.
    """

    title: str
    paper: str
    seeds: Positive
    rows: dict[str, Row] = Field(min_length=1)
    shows: tuple[Literal["speed", "cost"], ...] = ()

    @model_validator(mode="after")
    def _rows_exist(self):
        for name, row in self.rows.items():
            for other in (row.against, row.same_time_as):
                if other is not None and (other not in self.rows or other == name):
                    raise ValueError(f"row {name!r} is compared with {other!r}, which is no other row of its table")
            if row.same_time_as is not None and self.rows[row.same_time_as].same_time_as is not None:
                raise ValueError(f"row {name!r} takes the time of {row.same_time_as!r}, which takes another one's")
        return self


class SmokeSection(Section):
    """Overrides for a tiny form: of new encoders, then of every recipe of a kind."""

    encoder: Overrides = ()
    pretraining: Overrides = ()
    finetuning: Overrides = ()


class Experiment(Section):
    """A grid of runs.

    Attributes:
        name: Of the file.
        summary: One line.
        classes: Of the labels, the background first.
        modality: Of the scans; None takes it from each.
        tables: What is run and reported, in this order.
    """

    name: str
    summary: str
    classes: tuple[str, ...] = ()
    modality: Modality | None = None
    pretraining: PretrainingSection
    finetuning: FineTuningSection
    tables: dict[str, Table] = Field(min_length=1)
    smoke: SmokeSection = SmokeSection()

    def tiny(self) -> Experiment:
        """The same tables with half the seeds, at least one."""
        tables = {
            name: table.model_copy(update={"seeds": max(1, table.seeds // 2)}) for name, table in self.tables.items()
        }
        return self.model_copy(update={"tables": tables})


@dataclass(frozen=True, eq=False)
class PretrainingRun:
    """A variant of pretraining: its recipe, and how to write it on a command line."""

    id: str
    recipe: Recipe
    base: str
    overrides: Overrides


@dataclass(frozen=True, eq=False)
class FineTuningRun:
    """One seed of one row, or of several of the same settings.

    Attributes:
        recipe: Without its data, and with the id of `start` as the model's name where there is one.
        start: The pretraining that its encoder is from, if any.
        same_time_as: The run whose training time decides the number of steps.
        rows: (table, row) that it counts for.
    """

    id: str
    recipe: SegmentationRecipe
    base: str
    overrides: Overrides
    seed: int
    start: PretrainingRun | None
    same_time_as: FineTuningRun | None
    rows: list[tuple[str, str]] = field(default_factory=list)


Run = PretrainingRun | FineTuningRun


def experiment_folder() -> Path:
    """Where the packaged experiments are."""
    return packaged_folder("experiments")


def load_experiment(name: str) -> Experiment:
    """Reads an experiment.

    Args:
        name: A packaged one, or the path of a YAML file.

    Raises:
        SpecError: For a missing file, an unknown key or an impossible value.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else experiment_folder() / f"{name}.yaml"
    if not path.is_file():
        known = sorted(each.stem for each in experiment_folder().glob("*.yaml"))
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise SpecError(f"there is no experiment {name!r}; nearest: {', '.join(near or known)}")
    data = parse_yaml(read_text(path, RECIPE_BYTES), source=str(path))
    try:
        return Experiment.model_validate(data)
    except ValidationError as error:
        raise SpecError(f"{path}: {explain(error, Experiment)}") from None


def plan_runs(experiment: Experiment, *, smoke: bool = False) -> list[Run]:
    """The runs of an experiment, each once, in an order in which none needs a later one.

    Args:
        experiment: What is asked for; with `smoke`, what `Experiment.tiny` gave.
        smoke: Whether to apply the overrides of `experiment.smoke`.

    Raises:
        SpecError: For an override that is wrong.
    """
    planned = _Plan(experiment, experiment.smoke if smoke else SmokeSection())
    for name, table in experiment.tables.items():
        for seed in range(table.seeds):
            for row in table.rows:
                planned.add(name, row, seed)
    return list(planned.runs.values())


def needed_for(runs: Sequence[Run], tables: Sequence[str]) -> list[Run]:
    """Those of the runs that some tables have rows of, and what these start from; all when no table is named."""
    if not tables:
        return list(runs)
    tuned = [run for run in runs if isinstance(run, FineTuningRun) and any(table in tables for table, _ in run.rows)]
    needed = {run.id for run in tuned} | {run.start.id for run in tuned if run.start is not None}
    return [run for run in runs if run.id in needed]


class _Plan:
    """Runs by id, in the order in which they were asked for."""

    def __init__(self, experiment: Experiment, smoke: SmokeSection) -> None:
        self.experiment, self.smoke = experiment, smoke
        self.runs: dict[str, Run] = {}
        self.starts: dict[str, PretrainingRun] = {}  # by variant, which many rows and all seeds share

    def add(self, table: str, name: str, seed: int) -> FineTuningRun:
        row = self.experiment.tables[table].rows[name]
        section = self.experiment.finetuning
        start = self._pretraining(row.start) if row.start in self.experiment.pretraining.variants else None
        reference = self.add(table, row.same_time_as, seed) if row.same_time_as else None
        overrides = (*section.overrides, *self._start(row, start), *row.overrides, *self.smoke.finetuning)
        overrides = (*overrides, f"seed={seed}", *self._task())
        recipe = load_recipe(section.recipe, ("data=DATA", *overrides), kind=SegmentationRecipe)
        known = "" if reference is None else reference.id
        run = FineTuningRun(
            _identity(f"{_origin(row, recipe)}-seed{seed}", recipe, known),
            recipe,
            section.recipe,
            overrides,
            seed=seed,
            start=start,
            same_time_as=reference,
        )
        run = self.runs.setdefault(run.id, run)
        if (table, name) not in run.rows:
            run.rows.append((table, name))
        return run

    def _start(self, row: Row, start: PretrainingRun | None) -> Overrides:
        if start is not None:
            return f"model.name={start.id}", "model.pretrained=true"
        if row.start == SCRATCH:
            return "model.pretrained=false", *self.smoke.encoder
        is_place = ":" in row.start  # hf-hub: or local-dir:
        if not is_place and not is_model(row.start.partition(".")[0]):
            known = (SCRATCH, *self.experiment.pretraining.variants)
            raise SpecError(f"{row.start!r} is neither {', '.join(known)} nor a model with weights")
        return f"model.name={row.start}", "model.pretrained=true"

    def _task(self) -> Overrides:
        classes, modality = self.experiment.classes, self.experiment.modality
        return (
            *([f"classes={json.dumps(classes, ensure_ascii=False)}"] if classes else []),
            *([f"modality={modality}"] if modality else []),
        )

    def _pretraining(self, variant: str) -> PretrainingRun:
        if variant in self.starts:
            return self.starts[variant]
        section = self.experiment.pretraining
        given = section.variants[variant]
        is_new = load_recipe(section.recipe, given).model.weights is None
        overrides = (*given, *(self.smoke.encoder if is_new else ()), *self.smoke.pretraining)
        recipe = load_recipe(section.recipe, overrides)
        run = PretrainingRun(_identity(variant, recipe), recipe, section.recipe, overrides)
        self.starts[variant] = self.runs.setdefault(run.id, run)
        return self.starts[variant]


def _origin(row: Row, recipe: SegmentationRecipe) -> str:
    return f"{recipe.model.name}-{SCRATCH}" if row.start == SCRATCH else row.start


def _identity(name: str, recipe: RunRecipe, more: str = "") -> str:
    """A name for a folder: what it is, and a digest of all its settings."""
    digest = hashlib.sha256(f"{recipe.to_yaml()}{more}".encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9._]+', '-', name)}-{digest}"
