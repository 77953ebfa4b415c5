"""The loop that fine-tunes: steps, validation, checkpoints and what a run leaves; it knows no task by name.

As in pretraining, everything random about a step is seeded by the step, so a resumed run gives bit for bit the weights
of one that was never stopped. One process; the data is held in memory.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from medmim.errors import SpecError
from medmim.files import write_text
from medmim.limits import LIST_BYTES, read_json
from medmim.saving import save_pretrained
from medmim_training.checkpoint import BEST, load_latest, save_checkpoint
from medmim_training.claims import claim
from medmim_training.engine import CHECKPOINTS, METRICS_FILE, PICTURES, PRIME, RECIPE_FILE, NonFiniteLossError
from medmim_training.loading import Samples, batches
from medmim_training.optimization import clip_gradients, create_optimizer, create_schedule
from medmim_training.precision import forget_precision, usable_precision
from medmim_training.preemption import Preempted, stop_requests
from medmim_training.record import Clock, Meter, MetricsLog, Report
from medmim_training.tasks.cases import Case, Split, choose, split_cases
from medmim_training.tasks.recipe import FineTuneRecipe

MODEL, VALIDATION_FILE, SCORES_FILE, SPLIT_FILE = "model", "validation.jsonl", "scores.csv", "split.json"


class Validation(ABC):
    """How well the validation cases are predicted after some steps: a frozen dataclass, whose text is for people."""

    step: int

    @property
    @abstractmethod
    def quality(self) -> float:
        """What the best model has most of."""


class Task(ABC):
    """What a model is fine-tuned for: its data, its loss, and how well it does.

    Attributes:
        recipe: Of the run.
        split: Who trains, validates and stays out.
        classes: Their names by label.
        model: What is trained; `spec.volume` says how scans are prepared.
        head: The parts of it that are new for the task; all others are the encoder's.
    """

    recipe: FineTuneRecipe
    split: Split
    classes: Sequence[str]
    model: nn.Module
    head: Sequence[nn.Module]

    @abstractmethod
    def load(self) -> None:
        """Reads the cases that train and validate into memory."""

    @abstractmethod
    def samples(self, length: int) -> Samples:
        """`length` training samples, each a function of the seed and its number: a dict with `x` and `case`."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The loss of the model's `outputs`, in float32, for a batch of samples."""

    @abstractmethod
    def validate(self, step: int, pictures: Path) -> Validation:
        """How well the model does after `step` steps, in what decides which one is best.

        Args:
            step: Steps done.
            pictures: A folder, for pictures of predictions.
        """

    @abstractmethod
    def write_scores(self, path: Path) -> None:
        """Writes all that is measured of each validation case as a CSV file."""


def split_of(recipe: FineTuneRecipe, cases: Sequence[Case]) -> Split:
    """Who trains, of whom as many as the recipe says, who validates, and who stays out.

    Raises:
        SpecError: See `split_cases`.
    """
    split = split_cases(cases, recipe.fold, source=recipe.splits or recipe.data)
    chosen = choose(split.training, recipe.count_labels(len(split.training)), seed=recipe.seed)
    return Split(chosen, split.validation, split.test)


def claim_split(path: Path, split: Split, classes: Sequence[str] = ()) -> None:
    """Writes who is on which side; a run that is there already must have the same cases on the same sides.

    Args:
        path: The file.
        split: Of the run.
        classes: Names by label, where the run has its own; those of a run that is there must be the same.

    Raises:
        SpecError: When it has other cases, of whom some that trained could validate now, or other classes.
    """
    sides = {side.name: [case.name for case in getattr(split, side.name)] for side in fields(Split)}
    if path.is_file():
        before = read_json(path, LIST_BYTES)
        known = before.get("classes", list(classes))  # a run of an older medmim has none, and is believed
        if known != list(classes):
            raise SpecError(
                f"{path}: the run began with the classes {', '.join(known)}, and the data now has "
                f"{', '.join(classes)}; put the data back as it was, or choose another folder"
            )
        changed = [name for name, cases in sides.items() if sorted(cases) != sorted(before.get(name, ()))]
        if changed:
            raise SpecError(
                f"{path}: the run began with other cases for {', '.join(changed)} than the data has now; put the data "
                "back as it was, or choose another folder"
            )
    else:
        write_text(path, json.dumps(sides | ({"classes": list(classes)} if classes else {}), indent=1) + "\n")


class Run:
    """One run: what it is made of, and the loop over it.

    Args:
        task: What is trained, and for what.
        folder: `recipe.yaml`, `split.json` (who trains and validates, and the classes), `metrics.jsonl`,
            `validation.jsonl`, `checkpoints/`, `pictures/` and, at the end, `model/`, the best one, which
            `medmim.from_pretrained` loads, and `scores.csv`, how it does on each validation case. When it holds a
            checkpoint of the same recipe, the run resumes there.

    Raises:
        SpecError: For settings that cannot be used, or when the folder holds a run of another recipe, other
            cases or other classes.
        ScanError: For a case that cannot be read.
    """

    def __init__(self, task: Task, folder: str | Path) -> None:
        self.task, self.recipe, self.model, self.folder = task, task.recipe, task.model, Path(folder)
        recipe, precision = self.recipe, usable_precision(self.recipe)
        forget_precision()
        self.accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision, cpu=not torch.cuda.is_available()
        )
        if self.accelerator.num_processes > 1:
            raise SpecError("fine-tuning runs in one process; start it without a launcher")
        if self.model.spec.volume is None:
            raise SpecError(f"{recipe.name}: a model from scratch has no preprocessing; give volume= in the recipe")
        if (self.folder / RECIPE_FILE).is_file():  # said before all cases are read
            self._claim()
        task.load()
        self._claim()  # of cases that can be trained with: others leave the folder to another recipe

        self._choose_trained(encoder=not recipe.frozen)
        optimizer = create_optimizer(self.model, recipe.optimizer)
        self.schedule = create_schedule(optimizer, recipe.schedule)
        self.start, self.best, self.clock, self.validations = 0, -math.inf, Clock(), []
        scaler = self._resume(optimizer)
        self.trained, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        self.metrics = MetricsLog(self.folder / METRICS_FILE, self.start)

    # --- construction -------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Makes the folder this run's, or refuses that of another one."""
        claim(self.folder / RECIPE_FILE, self.recipe, kind=FineTuneRecipe)
        claim_split(self.folder / SPLIT_FILE, self.task.split, self.task.classes)

    def _resume(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Goes back to the newest checkpoint, if there is one; gives the state of its loss scaler."""
        checkpoint = load_latest(self.folder / CHECKPOINTS)
        if checkpoint is None:
            return None
        self.start, self.best, self.clock = checkpoint["step"], checkpoint["best"], Clock(checkpoint["spent"])
        self.validations = checkpoint["validations"]
        self.model.load_state_dict(checkpoint["method"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return checkpoint.get("scaler")

    # --- training -----------------------------------------------------------------------------------------------------

    def train(
        self,
        watch: Callable[[Report], None] = lambda report: None,
        watch_validation: Callable[[Validation], None] = lambda validation: None,
    ) -> nn.Module:
        """Runs to the end.

        Args:
            watch: Called every `output.log_every` steps.
            watch_validation: Called after each validation, every `output.checkpoint_every` steps.

        Returns:
            The model that was best in validation, in evaluation mode.

        Raises:
            NonFiniteLossError: When the loss or its gradient is no number any more.
            CheckpointError: When the disk is full.
            Preempted: After SIGTERM or Ctrl-C; the run has saved itself.
        """
        every, steps = self.recipe.output, self.recipe.schedule.steps
        meter = Meter(self.start, steps=steps, batch_size=self.recipe.batch_size, clock=self.clock)
        # Closing the batches ends the processes that read them, whose CPU time then counts.
        with closing(self._batches()) as drawn, stop_requests() as stop:
            for done in range(self.start + 1, steps + 1):
                with meter.waiting:
                    batch = next(drawn)
                loss, grad_norm = self._step(batch, done)
                finished, stopped = done == steps, stop.is_set()
                if finished or stopped or done % every.log_every == 0:
                    lr = max(group["lr"] for group in self.optimizer.param_groups)
                    report = meter.report(done, loss, lr, grad_norm)
                    self.metrics.write(report)
                    watch(report)
                if finished or done % every.checkpoint_every == 0:
                    watch_validation(self._validate_and_save(done))
                elif stopped:  # in the seconds that are left
                    self._save(done, is_best=False)
                if stopped and not finished:
                    raise Preempted(f"{self.folder}: stopped and saved at step {done}; the same command goes on")
        return self._finish()

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        size, workers, device = self.recipe.batch_size, self.recipe.crops.workers, self.accelerator.device
        samples = self.task.samples(self.recipe.schedule.steps * size)
        order = range(self.start * size, len(samples))
        return batches(samples, order, size=size, workers=workers, device=device)

    def _step(self, batch: dict[str, Tensor], done: int) -> tuple[float, float]:
        """One optimizer step: the loss, and the norm of the gradient before it was clipped."""
        self.schedule.step_update(done)  # from 1, so that the first step already has a rate above zero
        torch.manual_seed(self.recipe.seed * PRIME + done)  # for dropped paths, which take torch's own generator
        self._choose_trained(encoder=not self.recipe.frozen and done > self.recipe.head_warmup)
        loss = self.task.loss(self.trained(batch["x"]).float(), batch)
        if not math.isfinite(value := loss.item()):
            self._refuse("loss", value, batch, done)
        self.accelerator.backward(loss)
        self.accelerator.unscale_gradients()
        grad_norm = clip_gradients(self.trained.parameters(), self.recipe.optimizer.clip_grad)
        # Before it spreads to the weights, and with them to a checkpoint. A scaler leaves such a step out by itself.
        if not math.isfinite(grad_norm) and self.accelerator.scaler is None:
            self._refuse("gradient", grad_norm, batch, done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value, grad_norm

    def _refuse(self, what: str, value: float, batch: dict[str, Tensor], done: int) -> None:
        names = sorted({self.task.split.training[i].name for i in batch["case"].tolist()})
        raise NonFiniteLossError(f"step {done}: the {what} is {value}; look at {', '.join(names)}, or lower the rate")

    def _choose_trained(self, *, encoder: bool) -> None:
        """Training mode, in which the encoder may be left as it is: its weights and what it drops."""
        self.model.train(encoder).requires_grad_(encoder)
        for part in self.task.head:
            part.train().requires_grad_(True)

    # --- validation ---------------------------------------------------------------------------------------------------

    def _validate_and_save(self, done: int) -> Validation:
        """Validates and saves everything; the best model so far stays as such."""
        validation = self.task.validate(done, self.folder / PICTURES)
        self.validations.append(asdict(validation))
        is_best, self.best = validation.quality > self.best, max(validation.quality, self.best)
        self._save(done, is_best=is_best)
        self._write_validations()
        return validation

    def _write_validations(self) -> None:
        write_text(self.folder / VALIDATION_FILE, "".join(json.dumps(each) + "\n" for each in self.validations))

    def _save(self, done: int, *, is_best: bool) -> None:
        state: dict[str, Any] = {
            "step": done,
            "best": self.best,
            "spent": self.clock.read(),
            "validations": self.validations,
            "method": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
        }
        save_checkpoint(self.folder / CHECKPOINTS, done, state, keep=self.recipe.output.keep, best=is_best)

    def _finish(self) -> nn.Module:
        """Writes the best model and how it does on each case."""
        self._write_validations()  # the last is missing when the run was killed between its checkpoint and this file
        best = torch.load(self.folder / CHECKPOINTS / BEST, map_location="cpu", weights_only=True)
        self.model.load_state_dict(best["method"])
        self.task.write_scores(self.folder / SCORES_FILE)  # in the precision of the validations
        model: nn.Module = self.accelerator.unwrap_model(self.trained, keep_fp32_wrapper=False)
        model.requires_grad_(True)
        save_pretrained(model, self.folder / MODEL)
        return model.eval()
