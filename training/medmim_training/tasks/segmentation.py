"""Fine-tuning for segmentation: the loop, validation over whole cases, and what a run leaves.

As in pretraining, everything random about a step is seeded by the step, so a resumed run gives bit for bit the weights
of one that was never stopped. One process; the data is held in memory.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.utils.data import DataLoader

from medmim.errors import SpecError
from medmim.factory import save_pretrained
from medmim.files import atomic_write
from medmim.heads.segmenter import Segmenter
from medmim.pictures import segmentation_picture
from medmim.segmentation import predict_labels
from medmim.tasks import create_segmenter
from medmim.transforms import VolumeTransform
from medmim_training.checkpoint import BEST, load_latest, save_checkpoint
from medmim_training.engine import CHECKPOINTS, METRICS_FILE, PICTURES, PRIME, RECIPE_FILE, NonFiniteLossError
from medmim_training.optimization import create_optimizer, create_schedule
from medmim_training.precision import resolve_precision
from medmim_training.preemption import Preempted, stop_requests
from medmim_training.recipe import load_recipe
from medmim_training.record import Clock, MetricsLog, Report
from medmim_training.tasks.cases import (
    LoadedCase,
    Split,
    choose,
    find_cases,
    find_classes,
    load_case,
    pad_around,
    split_cases,
)
from medmim_training.tasks.crops import LabelledCrops
from medmim_training.tasks.metrics import Score, bootstrap_interval, mean_of_cases, score_case
from medmim_training.tasks.peers import PEERS, register_peers
from medmim_training.tasks.recipe import FineTuneRecipe

MODEL, VALIDATION_FILE, SCORES_FILE, SPLIT_FILE = "model", "validation.jsonl", "scores.csv", "split.json"


@dataclass(frozen=True)
class Validation:
    """How well the validation cases are segmented after some steps.

    Attributes:
        dice: Mean over cases of the mean over classes, and its 95 % interval from resampled cases.
        hd95: Likewise, in mm.
    """

    step: int
    dice: float
    dice_interval: tuple[float, float]
    hd95: float
    hd95_interval: tuple[float, float]

    @classmethod
    def of(cls, step: int, scores: list[Score]) -> Validation:
        dice, hd95 = (mean_of_cases(scores, metric) for metric in ("dice", "hd95"))
        return cls(step, float(dice.mean()), bootstrap_interval(dice), float(hd95.mean()), bootstrap_interval(hd95))


def finetune(
    recipe: FineTuneRecipe,
    folder: str | Path,
    *,
    watch: Callable[[Report], None] = lambda report: None,
    watch_validation: Callable[[Validation], None] = lambda validation: None,
) -> Segmenter:
    """Fine-tunes, or goes on, and writes everything to `folder`.

    Args:
        recipe: What to do.
        folder: `recipe.yaml`, `split.json` (who trains and validates), `metrics.jsonl`, `validation.jsonl`,
            `checkpoints/`, `pictures/` and, at the end, `model/`, the best one, which `medmim.from_pretrained` loads,
            and `scores.csv`, its scores for each class and validation case. When it holds a checkpoint of the same
            recipe, the run resumes there.
        watch: Called every `output.log_every` steps.
        watch_validation: Called after each validation, every `output.checkpoint_every` steps.

    Returns:
        The model that was best in validation, in evaluation mode.

    Raises:
        SpecError: For data, splits or settings that cannot be used, or when the folder holds another recipe's run.
        ScanError: For a case that cannot be read.
        NonFiniteLossError: When the loss is no number any more.
        CheckpointError: When the disk is full.
        Preempted: After SIGTERM; the run has saved itself.
    """
    return _Run(recipe, Path(folder)).train(watch, watch_validation)


def build_segmenter(recipe: FineTuneRecipe) -> Segmenter:
    """The recipe's network; the same weights for the same seed."""
    if recipe.model.name in PEERS:
        register_peers()
    torch.manual_seed(recipe.seed)
    return create_segmenter(
        recipe.model.name,
        recipe.decoder.name,
        classes=find_classes(recipe.data, recipe.classes),
        pretrained=recipe.model.pretrained,
        decoder_args=recipe.decoder.args,
        volume=recipe.volume,
        **recipe.model.args,
    )


class _Run:
    """One run: what it is made of, and the loop over it."""

    def __init__(self, recipe: FineTuneRecipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        precision = resolve_precision(recipe.precision)
        self.accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision, cpu=not torch.cuda.is_available()
        )
        if self.accelerator.num_processes > 1:
            raise SpecError("fine-tuning runs in one process; start it without a launcher")
        source = recipe.splits or recipe.data
        split = split_cases(find_cases(recipe.data, recipe.splits), recipe.fold, source=source)
        chosen = choose(split.training, recipe.count_labels(len(split.training)), seed=recipe.seed)
        split = Split(chosen, split.validation, split.test)
        self.model = build_segmenter(recipe)
        if self.model.spec.volume is None:
            raise SpecError(f"{recipe.name}: a model from scratch has no preprocessing; give volume= in the recipe")
        self.classes = self.model.spec.task.classes
        self._claim(split)

        transform = VolumeTransform(
            self.model.spec.volume, (1, 1, 1), in_chans=self.model.in_chans, modality=recipe.modality, fit="pad"
        )
        self.training, self.validation = (
            [load_case(case, transform, num_classes=len(self.classes)) for case in cases]
            for cases in (split.training, split.validation)
        )
        self.loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
        self.model.encoder.requires_grad_(not recipe.frozen)
        optimizer = create_optimizer(self.model, recipe.optimizer)
        self.schedule = create_schedule(optimizer, recipe.schedule)
        self.start, self.best, self.clock, self.validations = 0, -math.inf, Clock(), []
        self._resume(optimizer)
        self.trained, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.metrics = MetricsLog(folder / METRICS_FILE, self.start)

    # --- construction -------------------------------------------------------------------------------------------------

    def _claim(self, split: Split) -> None:
        """Makes the run's folder, or checks that the run in it is this recipe's."""
        path = self.folder / RECIPE_FILE
        if path.is_file() and load_recipe(str(path), kind=FineTuneRecipe).to_yaml() != self.recipe.to_yaml():
            raise SpecError(
                f"{path}: another recipe ran here; choose another folder, or that recipe to go on with its run"
            )
        sides = {field.name: [case.name for case in getattr(split, field.name)] for field in fields(Split)}
        texts = {RECIPE_FILE: self.recipe.to_yaml(), SPLIT_FILE: json.dumps(sides, indent=1) + "\n"}
        for name, text in texts.items():
            with atomic_write(self.folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        checkpoint = load_latest(self.folder / CHECKPOINTS)
        if checkpoint is None:
            return
        self.start, self.best, self.clock = checkpoint["step"], checkpoint["best"], Clock(checkpoint["spent"])
        self.validations = checkpoint["validations"]
        self.model.load_state_dict(checkpoint["method"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    # --- training -----------------------------------------------------------------------------------------------------

    def train(self, watch: Callable[[Report], None], watch_validation: Callable[[Validation], None]) -> Segmenter:
        every, steps = self.recipe.output, self.recipe.schedule.steps
        batches, waited, since = self._batches(), 0.0, (self.start, time.perf_counter())
        with stop_requests() as stop:
            for done in range(self.start + 1, steps + 1):
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                loss, grad_norm = self._step(batch, done)
                finished, stopped = done == steps, stop.is_set()
                if finished or stopped or done % every.log_every == 0:
                    report = self._report(done, loss, grad_norm, waited, since)
                    self.metrics.write(report)
                    watch(report)
                    waited, since = 0.0, (done, time.perf_counter())
                if finished or stopped or done % every.checkpoint_every == 0:
                    validation = self._validate_and_save(done)
                    watch_validation(validation)
                if stopped and not finished:
                    raise Preempted(f"{self.folder}: stopped and saved at step {done}; the same command goes on")
        return self._finish()

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        settings, batch_size = self.recipe.crops, self.recipe.batch_size
        dataset = LabelledCrops(
            self.training,
            self.model.img_size,
            length=self.recipe.schedule.steps * batch_size,
            seed=self.recipe.seed,
            settings=settings,
        )
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=range(self.start * batch_size, len(dataset)),
            num_workers=settings.workers,
            # Forking a process in which torch's threads run can hang.
            multiprocessing_context="spawn" if settings.workers else None,
        )
        for batch in loader:
            yield {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}

    def _step(self, batch: dict[str, Tensor], done: int) -> tuple[float, float]:
        """One optimizer step: the loss, and the norm of the gradient before it was clipped."""
        self.schedule.step_update(done)  # from 1, so that the first step already has a rate above zero
        torch.manual_seed(self.recipe.seed * PRIME + done)  # for dropped paths, which take torch's own generator
        self._choose_trained(encoder=not self.recipe.frozen and done > self.recipe.head_warmup)
        loss = self.loss(self.trained(batch["x"]).float(), batch["labels"])
        if not math.isfinite(value := loss.item()):
            names = sorted({self.training[i].name for i in batch["case"].tolist()})
            raise NonFiniteLossError(f"step {done}: the loss is {value}; look at {', '.join(names)}, or lower the rate")
        self.accelerator.backward(loss)
        grad_norm = self.accelerator.clip_grad_norm_(self.trained.parameters(), self.recipe.optimizer.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value, float(grad_norm)

    def _choose_trained(self, *, encoder: bool) -> None:
        """Training mode, in which the encoder may be left as it is: its weights and what it drops."""
        self.model.train()
        self.model.encoder.requires_grad_(encoder)
        self.model.encoder.train(encoder)

    def _report(self, done: int, loss: float, grad_norm: float, waited: float, since: tuple[int, float]) -> Report:
        seconds, spent = time.perf_counter() - since[1], self.clock.read()
        return Report(
            step=done,
            steps=self.recipe.schedule.steps,
            loss=loss,
            lr=max(group["lr"] for group in self.optimizer.param_groups),
            grad_norm=grad_norm,
            crops_per_second=(done - since[0]) * self.recipe.batch_size / seconds,
            waiting=waited / seconds,
            wall_seconds=spent["wall"],
            cpu_seconds=spent["cpu"],
        )

    # --- validation ---------------------------------------------------------------------------------------------------

    def _validate_and_save(self, done: int) -> Validation:
        """Validates, draws a case, and saves everything; the best model so far stays as such."""
        scores = []
        for number, case in enumerate(self.validation):
            x, inside = pad_around(case.x, self.model.img_size, value=float(case.x.min()))
            labels = predict_labels(self.model, x, overlap=self.recipe.overlap)[inside]
            scores += score_case(case.name, labels, case.labels, classes=self.classes, spacing=case.spacing)
            if number == 0:
                self._draw(case, labels, done)
        validation = Validation.of(done, scores)
        self.validations.append(asdict(validation))
        is_best, self.best = validation.dice > self.best, max(validation.dice, self.best)
        state = {
            "step": done,
            "best": self.best,
            "spent": self.clock.read(),
            "validations": self.validations,
            "scores": [astuple(score) for score in scores],
            "method": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.folder / CHECKPOINTS, done, state, keep=self.recipe.output.keep, best=is_best)
        with atomic_write(self.folder / VALIDATION_FILE) as temporary:
            temporary.write_text("".join(json.dumps(each) + "\n" for each in self.validations), encoding="utf-8")
        return validation

    def _draw(self, case: LoadedCase, labels: Tensor, done: int) -> None:
        segmentation_picture(
            case.x,
            {"truth": case.labels, "prediction": labels},
            self.folder / PICTURES / f"step-{done:08d}.png",
            spacing=case.spacing,
            orientation=self.model.spec.volume.orientation,
            title=f"{case.name}, step {done}",
        )

    def _finish(self) -> Segmenter:
        """Writes the best model and its scores."""
        best = torch.load(self.folder / CHECKPOINTS / BEST, map_location="cpu", weights_only=True)
        with atomic_write(self.folder / SCORES_FILE) as temporary:
            write_scores(temporary, [Score(*each) for each in best["scores"]])
        model: nn.Module = self.accelerator.unwrap_model(self.trained, keep_fp32_wrapper=False)
        model.load_state_dict(best["method"])
        model.requires_grad_(True)
        save_pretrained(model, self.folder / MODEL)
        return model.eval()


def write_scores(path: Path, scores: list[Score]) -> None:
    """Writes a CSV with a row a case and class."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Score))
        writer.writerows((s.case, s.label, f"{s.dice:.6g}", f"{s.hd95:.6g}") for s in scores)
