"""What an experiment's runs gave: a row a run, and what rows say together over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from scipy import stats

from medmim.files import write_csv
from medmim.layers.tokens import to_size
from medmim.limits import CONFIG_BYTES, LIST_BYTES, read_json, read_text
from medmim_training.engine import RECIPE_FILE
from medmim_training.recipe import load_recipe
from medmim_training.reproduce.experiment import FineTuningRun
from medmim_training.reproduce.runner import Runner, cpu_seconds
from medmim_training.tasks.cases import MEAN
from medmim_training.tasks.evaluation import means_file
from medmim_training.tasks.loop import SPLIT_FILE, VALIDATION_FILE
from medmim_training.tasks.recipe import SegmentationRecipe

Curve = tuple[tuple[int, float], ...]  # steps and validation Dice


@dataclass(frozen=True)
class Result:
    """One fine-tuning run: its settings, those of the pretraining that it started from, and what came out.

    Dice and HD95 (mm) are measured in the scans' own voxels; `curve` is what validation on the network's grid gave
    during the run.
    """

    run: str
    rows: str
    start: str
    method: str
    hidden_ratio: float | None
    decoder_depth: int | None
    pretraining_steps: int | None
    pretraining_cpu_seconds: float | None
    patch: str
    spacing: str
    labels: str
    training_cases: int
    seed: int
    head: str
    steps: int
    best_step: int
    validation_dice: float
    validation_hd95: float
    test_dice: float
    test_dice_low: float
    test_dice_high: float
    test_hd95: float
    cpu_seconds: float
    curve: Curve


def collect(runner: Runner) -> list[Result]:
    """The results of the runs that are done, in the order of the plan."""
    return [_result(runner, run) for run in runner.runs if isinstance(run, FineTuningRun) and runner.is_done(run)]


def _result(runner: Runner, run: FineTuningRun) -> Result:
    folder = runner.place(run)
    recipe = load_recipe(str(folder / RECIPE_FILE), kind=SegmentationRecipe)
    lines = read_text(folder / VALIDATION_FILE, LIST_BYTES).splitlines()
    curve = tuple((each["step"], each["dice"]) for each in map(json.loads, lines))
    validation, test = (
        read_json(means_file(folder, side), CONFIG_BYTES)["results"][MEAN] for side in ("validation", "test")
    )
    before, method = run.start, {}
    if before is not None:
        method = before.recipe.method.args
    decoder = method.get("decoder", {})
    patch = recipe.model.args.get("patch_size")  # one number is a cube
    return Result(
        run=run.id,
        rows="; ".join(f"{table}: {row}" for table, row in run.rows),
        start=run.id.rsplit("-seed", 1)[0],
        method=before.recipe.method.name if before else "",
        hidden_ratio=method.get("ratio"),
        decoder_depth=decoder.get("depth"),
        pretraining_steps=before.recipe.schedule.steps if before else None,
        pretraining_cpu_seconds=cpu_seconds(runner.place(before)) if before else None,
        patch=_sides(to_size(patch, "patch_size") if patch else None),
        spacing=_sides(recipe.volume.spacing if recipe.volume else None),
        labels=str(recipe.labels),
        training_cases=len(read_json(folder / SPLIT_FILE, LIST_BYTES)["training"]),
        seed=run.seed,
        head=recipe.decoder.name,
        steps=recipe.schedule.steps,
        best_step=max(curve, key=lambda point: point[1])[0],
        validation_dice=_number(validation["dice"][0]),
        validation_hd95=_number(validation["hd95"][0]),
        test_dice=_number(test["dice"][0]),
        test_dice_low=_number(test["dice"][1]),
        test_dice_high=_number(test["dice"][2]),
        test_hd95=_number(test["hd95"][0]),
        cpu_seconds=_number(cpu_seconds(folder)),
        curve=curve,
    )


def _sides(values: Sequence[float] | None) -> str:
    return "x".join(f"{value:g}" for value in values) if values else ""


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Writes a CSV with a row a run; of the curve only its last Dice."""
    names = [field.name for field in fields(Result) if field.name != "curve"]
    rows = ([*(_cell(getattr(r, name)) for name in names), _cell(r.curve[-1][1])] for r in results)
    write_csv(path, [*names, "final_curve_dice"], rows)


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


# --- over seeds -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A mean difference over seeds, and its 95 % interval by Student's t; NaN with fewer than two."""

    mean: float
    low: float
    high: float
    number: int

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours minus theirs over the seeds that both have; None when they share none."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = np.array([ours[seed] - theirs[seed] for seed in seeds])
    mean, number = float(differences.mean()), len(seeds)
    if number < 2:
        return Difference(mean, math.nan, math.nan, number)
    half = float(stats.t.ppf(0.975, number - 1) * differences.std(ddof=1) / math.sqrt(number))
    return Difference(mean, mean - half, mean + half, number)


def steps_to(curve: Curve, dice: float) -> float:
    """When a curve first reaches a Dice, between its points along straight lines; infinite when it never does."""
    before = None
    for step, value in curve:
        if value >= dice:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (dice - before[1]) / (value - before[1])
        before = step, value
    return math.inf


@dataclass(frozen=True)
class Speed:
    """How many times fewer steps than another row ours take to that row's final validation Dice: median over seeds.

    A seed that never reaches it counts as 0 times; `reached` of `number` do.
    """

    ratio: float
    reached: int
    number: int


def speed(ours: Mapping[int, Curve], theirs: Mapping[int, Curve]) -> Speed | None:
    """Compares curves seed by seed; None when they share no seed."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    finals = {seed: theirs[seed][-1][1] for seed in seeds}
    ratios = [steps_to(theirs[seed], finals[seed]) / steps_to(ours[seed], finals[seed]) for seed in seeds]
    return Speed(statistics.median(ratios), sum(ratio > 0 for ratio in ratios), len(seeds))
