"""Runs an experiment's grid, one run after another: skips what is done, resumes what was stopped, goes past what fails.

What is done is decided by what the run left, not by the manifest, which only tells a reader how things stand. Several
processes may do so in one folder: each takes runs that no other has.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import statistics
import tempfile
import textwrap
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medmim.errors import MedmimError, SpecError
from medmim.files import write_text
from medmim.hub import CONFIG
from medmim.limits import CONFIG_BYTES, LIST_BYTES, read_json
from medmim.saving import save_pretrained
from medmim.spec import Modality, VolumeSpec
from medmim_training.checkpoint import CheckpointError
from medmim_training.engine import CHECKPOINTS, METRICS_FILE, RECIPE_FILE, pretrain
from medmim_training.preemption import Preempted, stop_requests
from medmim_training.recipe import Recipe, load_recipe
from medmim_training.record import Report, logged_lines
from medmim_training.reproduce.experiment import (
    ENCODER,
    FINETUNING,
    PRETRAINING,
    Experiment,
    FineTuningRun,
    Overrides,
    PretrainingRun,
    Run,
    needed_for,
    plan_runs,
)
from medmim_training.reproduce.sharing import Claims
from medmim_training.store.index import Store
from medmim_training.store.prepare import prepare
from medmim_training.store.sources import Source
from medmim_training.tasks.cases import Split, find_cases, split_cases
from medmim_training.tasks.evaluation import Side, evaluate_run, means_file, write_evaluation
from medmim_training.tasks.finetuning import finetune
from medmim_training.tasks.loop import SPLIT_FILE, claim_split
from medmim_training.tasks.recipe import SegmentationRecipe

MANIFEST, STORES = "manifest.json", "stores"
SIDES: tuple[Side, ...] = ("validation", "test")
PROBLEM_LENGTH = 300  # characters; some libraries write pages
POLL = 5.0  # seconds between looks at what other processes have done
TIMED_STEPS, UNTIMED_STEPS = 5, 2  # of a trial: the first ones pay for what later ones find ready


class IncompleteError(MedmimError):
    """Some runs of an experiment failed; the others are done."""


@dataclass(frozen=True)
class Progress:
    """What whoever watches is told: a run, its number of how many, and the step it is at, None when it ended."""

    run: Run
    number: int
    total: int
    step: Report | None = None
    problem: str | None = None


class Runner:
    """The runs of an experiment in a folder: `runs` are all, `wanted` those that `run` does.

    Args:
        experiment: The grid.
        data: A folder in the layout of the Medical Segmentation Decathlon, with `subjects.csv`.
        folder: Where runs, stores and the manifest go.
        only: Tables whose runs are wanted; empty for all.
        smoke: The tiny form.

    Raises:
        SpecError: For a table that does not exist, or data whose split does not leave cases for all three sides.
    """

    def __init__(
        self,
        experiment: Experiment,
        data: str | Path,
        folder: str | Path,
        *,
        only: Sequence[str] = (),
        smoke: bool = False,
    ) -> None:
        for name in only:
            if name not in experiment.tables:
                raise SpecError(f"{experiment.name} has no table {name!r}; it has {', '.join(experiment.tables)}")
        # Paths are part of the recipes of runs, which must be the same in each session.
        self.data, self.folder = Path(data).resolve(), Path(folder).resolve()
        self.experiment, self.smoke = experiment.tiny() if smoke else experiment, smoke
        self.runs = plan_runs(self.experiment, smoke=smoke)
        self.wanted = needed_for(self.runs, only)
        self.problems: dict[str, str] = {}
        self.claims = Claims(self.folder)
        self.split = _split(self.data, [run.recipe for run in self.runs if isinstance(run, FineTuningRun)])

    def run(self, watch: Callable[[Progress], None] = lambda progress: None) -> None:
        """Runs what is not done yet and what no other process is doing, until there is no such run.

        Raises:
            SpecError: When the runs that are there were of other cases.
            Preempted: After SIGTERM; the same command goes on.
            IncompleteError: At the end, when runs failed; the same command tries them again.
            CheckpointError: When the disk is full.
        """
        self.claim()
        self.problems.clear()
        with stop_requests() as stop:
            try:
                self.write_manifest()
                while self._pass(stop, watch):
                    if stop.wait(POLL):
                        raise Preempted(f"{self.folder}: stopped while other processes ran; the same command goes on")
            finally:
                self.write_manifest()
        if self.problems:
            first, problem = next(iter(self.problems.items()))
            raise IncompleteError(
                f"{len(self.problems)} of {len(self.wanted)} runs failed, such as {first} ({problem}); "
                "the same command tries them again"
            )

    def claim(self) -> None:
        """Binds the folder to these cases.

        Raises:
            SpecError: When the runs that are there were of other cases.
        """
        with self.claims.alone():
            claim_split(self.folder / SPLIT_FILE, self.split)

    def _pass(self, stop: threading.Event, watch: Callable[[Progress], None]) -> bool:
        """Does each run that can be done now; gives whether some wait for what other processes are doing."""
        waiting, total = False, len(self.wanted)
        for number, run in enumerate(self.wanted, start=1):
            if self.is_done(run) or run.id in self.problems or self._is_needless(run):
                continue
            needed = [each for each in (getattr(run, "start", None), getattr(run, "same_time_as", None)) if each]
            failed = next((each.id for each in needed if each.id in self.problems), None)
            if failed is None and not all(map(self.is_done, needed)):
                waiting = True
                continue
            with self.claims.of(run.id) as is_ours:
                if not is_ours or self.is_done(run):  # since we looked
                    continue
                self.write_manifest()
                self._try(run, failed, lambda **told: watch(Progress(run, number, total, **told)))  # noqa: B023
            self.write_manifest()
            if stop.is_set():
                raise Preempted(f"{self.folder}: stopped after run {number} of {total}; the same command goes on")
        return waiting

    def _try(self, run: Run, failed: str | None, tell: Callable[..., None]) -> None:
        """Does a run; keeps its problem, such as a `failed` run that it needs."""
        try:
            if failed is not None:
                raise SpecError(f"it needs {failed}, which failed")
            self._one(run, lambda step: tell(step=step))
        except (Preempted, CheckpointError):
            raise
        except Exception as error:  # whatever it is, the runs after this one are worth having
            self.problems[run.id] = _sentence(error)
        tell(problem=self.problems.get(run.id))

    # --- where things are ---------------------------------------------------------------------------------------------

    def place(self, run: Run) -> Path:
        """The folder of a run."""
        return self.folder / (PRETRAINING if isinstance(run, PretrainingRun) else FINETUNING) / run.id

    def is_done(self, run: Run) -> bool:
        """Whether all is there that a run leaves."""
        if isinstance(run, PretrainingRun):
            return (self.place(run) / ENCODER / CONFIG).is_file()
        return all(means_file(self.place(run), side).is_file() for side in SIDES)

    def left(self) -> list[Run]:
        """Those of `wanted` that are not done and that something waits for."""
        return [run for run in self.wanted if not self.is_done(run) and not self._is_needless(run)]

    def _is_needless(self, run: Run) -> bool:
        """Whether all is done that would start from a pretraining, whose weights may have been deleted since."""
        if not isinstance(run, PretrainingRun):
            return False
        tuned = [each for each in self.wanted if isinstance(each, FineTuningRun) and each.start is run]
        return all(map(self.is_done, tuned))

    def overrides(self, run: Run) -> Overrides:
        """What a run's recipe is made with: its own overrides, and where data and encoder are here."""
        if isinstance(run, PretrainingRun):
            return run.overrides
        found = [f"data={json.dumps(str(self.data))}", *run.overrides]
        if run.start is not None:
            found.append(f"model.name={json.dumps(f'local-dir:{self.place(run.start) / ENCODER}')}")
        if run.same_time_as is not None and (steps := self._steps(run)):
            found += [f"schedule.steps={steps}", f"output.checkpoint_every={max(1, steps // 10)}"]
        return tuple(found)

    def command(self, run: Run) -> str:
        """The command line that does the same run by hand."""
        words = ["medmim-train", "pretrain" if isinstance(run, PretrainingRun) else "finetune", run.base]
        if isinstance(run, PretrainingRun):
            words += ["--data", str(self._store_folder(run.recipe))]
        return shlex.join([*words, *self.overrides(run), "-o", str(self.place(run))])

    def write_manifest(self) -> None:
        """Writes how each run stands, with the command that does it by hand and what it cost so far."""
        with self.claims.alone():
            problems = self._known_problems() | self.problems
            entries = [
                {
                    "run": run.id,
                    "kind": PRETRAINING if isinstance(run, PretrainingRun) else FINETUNING,
                    "for": [f"{table}: {row}" for table, row in getattr(run, "rows", ())],
                    "status": (status := self._status(run, problems)),
                    **({"problem": problems[run.id]} if status == "failed" else {}),
                    "cpu_seconds": cpu_seconds(self.place(run)),
                    "command": self.command(run),
                }
                for run in self.runs
            ]
            write_text(self.folder / MANIFEST, json.dumps(entries, indent=1) + "\n")

    def _known_problems(self) -> dict[str, str]:
        """What the manifest says of runs that failed, of other processes too, until they are tried again."""
        path = self.folder / MANIFEST
        entries = read_json(path, LIST_BYTES) if path.is_file() else []
        return {entry["run"]: entry["problem"] for entry in entries if "problem" in entry}

    def _status(self, run: Run, problems: dict[str, str]) -> str:
        if self.is_done(run):
            return "done"
        if self.claims.taken(run.id):
            return "running"
        if run.id in problems:
            return "failed"
        return "stopped" if (self.place(run) / RECIPE_FILE).is_file() else "waiting"

    # --- one run ------------------------------------------------------------------------------------------------------

    def _one(self, run: Run, watch: Callable[[Report], None]) -> None:
        folder = self.place(run)
        if isinstance(run, PretrainingRun):
            method = pretrain(load_recipe(run.base, run.overrides), self._store(run.recipe), folder, watch=watch)
            save_pretrained(method.encoder, folder / ENCODER)
            return
        if run.same_time_as is not None and self._steps(run) is None:
            self._choose_steps(run)
        recipe = load_recipe(run.base, self.overrides(run), kind=SegmentationRecipe)
        finetune(recipe, folder, watch=watch)
        for side in SIDES:
            write_evaluation(folder, evaluate_run(folder, side), side)
        shutil.rmtree(folder / CHECKPOINTS)  # several times the model, which stays

    def _store_folder(self, recipe: Recipe) -> Path:
        """Of a preprocessing: what it is at a glance, and a digest of all of it."""
        spacing, how = recipe.volume.spacing, [recipe.volume.to_data(), self.experiment.modality]
        digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:8]
        return self.folder / STORES / f"{'x'.join(f'{step:g}' for step in spacing) if spacing else 'own'}mm-{digest}"

    def _store(self, recipe: Recipe) -> Store:
        """The images of the training cases, and of no others: what validates and tests is not even seen unlabelled."""
        folder = self._store_folder(recipe)
        with self.claims.alone(folder.name):
            return _prepared(self.split, folder, recipe.volume, self.experiment.modality)

    # --- the same time ------------------------------------------------------------------------------------------------

    def _steps_file(self, run: FineTuningRun) -> Path:
        return self.folder / FINETUNING / f"{run.id}.steps.json"

    def _steps(self, run: FineTuningRun) -> int | None:
        path = self._steps_file(run)
        return int(read_json(path, CONFIG_BYTES)["steps"]) if path.is_file() else None

    def _choose_steps(self, run: FineTuningRun) -> None:
        """Measures a step of a run and of the one whose time it gets, and notes how many steps that makes."""
        recipes = [
            load_recipe(each.base, self.overrides(each), kind=SegmentationRecipe) for each in (run, run.same_time_as)
        ]
        ours, theirs = (seconds_a_step(recipe) for recipe in recipes)
        steps = max(2, round(recipes[1].schedule.steps * theirs / ours))
        result = {"steps": steps, "seconds_a_step": ours, "seconds_a_step_of_the_other": theirs}
        write_text(self._steps_file(run), json.dumps(result, indent=1) + "\n")


def _sentence(error: Exception) -> str:
    text = str(error) if isinstance(error, MedmimError) else f"{type(error).__name__}: {error}"
    return textwrap.shorten(text, PROBLEM_LENGTH, placeholder=" ...")


def cpu_seconds(folder: Path) -> float | None:
    """What a run took so far, over all its sessions; None where its record is not kept."""
    lines = logged_lines(folder / METRICS_FILE)
    return round(json.loads(lines[-1])["cpu_seconds"], 3) if lines else None


class _Enough(Exception):
    """Ends a trial."""


def seconds_a_step(recipe: SegmentationRecipe) -> float:
    """What a step costs here, crops included: CPU seconds, or on a GPU those of the clock; the median of a few.

    One after the warm-up of the head, in which the encoder is not trained and a step is cheaper.
    """
    times = []

    def watch(report: Report) -> None:
        times.append(report.wall_seconds if torch.cuda.is_available() else report.cpu_seconds)
        if len(times) > UNTIMED_STEPS + TIMED_STEPS:
            raise _Enough

    steps = UNTIMED_STEPS + TIMED_STEPS + 2  # never reached, so that nothing is validated
    changes: dict[str, Any] = {
        "head_warmup": 0,
        "schedule": recipe.schedule.model_copy(update={"steps": steps, "warmup": 0}),
        "output": recipe.output.model_copy(update={"log_every": 1, "checkpoint_every": steps}),
    }
    with tempfile.TemporaryDirectory(prefix="medmim-trial-") as folder, suppress(_Enough):
        finetune(recipe.model_copy(update=changes), folder, watch=watch)
    return statistics.median(b - a for a, b in zip(times[UNTIMED_STEPS:], times[UNTIMED_STEPS + 1 :], strict=False))


def _split(data: Path, recipes: Sequence[SegmentationRecipe]) -> Split:
    """Who trains, validates and tests in all runs: pretraining sees the images of those who train."""
    if len({(recipe.fold, recipe.splits) for recipe in recipes}) > 1:
        raise SpecError("rows of an experiment must have one fold and one split file: pretraining is of one split")
    split = split_cases(find_cases(data, recipes[0].splits), recipes[0].fold, source=str(data))
    if not split.test:
        raise SpecError(f"{data}: no case is for the test; give some the split test in subjects.csv")
    return split


def _prepared(split: Split, folder: Path, volume: VolumeSpec, modality: Modality | None) -> Store:
    if modality is None and len(volume.intensity) == 1:
        (modality,) = volume.intensity
    sources = [Source(case.image, case.image.name, modality) for case in split.training]
    _, refused = prepare(sources, folder, volume=volume)
    if refused:
        raise SpecError(f"{folder}: {refused} scans could not be prepared; problems.jsonl in it says why")
    return Store(folder)
