"""The training loop: it knows crops, a method and a schedule, and no method by name.

Everything random about sample i, its crop and what is hidden of it, is seeded by (seed, i); so a run resumed from a
checkpoint gives bit for bit the weights of one that was never stopped, with no random state to save, and a batch split
over ranks is the batch of one process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from medmim.errors import MedmimError, SpecError
from medmim.factory import create_model
from medmim.files import atomic_write
from medmim.pictures import reconstruction_picture
from medmim_training.checkpoint import load_latest, save_checkpoint
from medmim_training.methods import MethodOutput, create_method
from medmim_training.recipe import Recipe
from medmim_training.record import Clock, MetricsLog, Report, write_record
from medmim_training.store.crops import CropDataset
from medmim_training.store.index import Store

RECIPE_FILE, METRICS_FILE, RECORD_FILE = "recipe.yaml", "metrics.jsonl", "record.json"
CHECKPOINTS, PICTURES = "checkpoints", "pictures"

PRIME = 15_485_863  # keeps the samples of different seeds apart


class NonFiniteLossError(MedmimError):
    """The loss became NaN or infinite; the message names the scans of the batch."""


def build_method(recipe: Recipe) -> nn.Module:
    """The recipe's method around its freshly initialised encoder; the same weights for the same seed."""
    torch.manual_seed(recipe.seed)
    return create_method(recipe.method.name, create_model(recipe.model.name, **recipe.model.args), recipe.method.args)


def pretrain(
    recipe: Recipe, store: Store, folder: str | Path, *, watch: Callable[[Report], None] = lambda report: None
) -> nn.Module:
    """Trains, or goes on training, and writes everything to `folder`.

    Args:
        recipe: What to train.
        store: Crops come from here.
        folder: `recipe.yaml`, `metrics.jsonl`, `checkpoints/`, `pictures/` and, at the end, `record.json`. When it
            holds a checkpoint of the same recipe, training resumes there.
        watch: Called every `output.log_every` steps.

    Returns:
        The trained method.

    Raises:
        SpecError: When the folder holds another recipe's run, or the store does not fit.
        NonFiniteLossError: When the loss is no number any more.
    """
    folder = Path(folder)
    store.check(recipe.volume)
    _claim(folder, recipe)
    accelerator = Accelerator(mixed_precision="no" if recipe.precision == "fp32" else recipe.precision)
    method = build_method(recipe)
    optimizer = _optimizer(method, recipe)
    schedule = _schedule(optimizer, recipe)

    start, clock = 0, Clock()
    if (checkpoint := load_latest(folder / CHECKPOINTS)) is not None:
        start, clock = checkpoint["step"], Clock(checkpoint["spent"])
        method.load_state_dict(checkpoint["method"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    trained, optimizer = accelerator.prepare(method, optimizer)
    trained.train()

    batches = _batches(recipe, store, method, start, accelerator)
    metrics = MetricsLog(folder / METRICS_FILE, start)
    meter = _Meter(recipe, start, clock)
    for done in range(start + 1, recipe.schedule.steps + 1):
        with meter.waiting:
            batch = next(batches)
        schedule.step_update(done)  # from 1, so that the first step already has a rate above zero
        output = _forward(trained, batch, recipe.seed)
        loss = output.loss.item()
        if not math.isfinite(loss):
            scans = sorted({store.entries[i].source for i in batch["volume"].tolist()})
            raise NonFiniteLossError(f"step {done}: the loss is {loss}; look at {', '.join(scans)}, or lower the rate")
        accelerator.backward(output.loss)
        grad_norm = accelerator.clip_grad_norm_(trained.parameters(), recipe.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        last = done == recipe.schedule.steps
        if last or done % recipe.output.log_every == 0:
            report = meter.report(done, loss, optimizer.param_groups[0]["lr"], float(grad_norm))
            metrics.write(report)
            watch(report)
        if output.picture is not None and done % recipe.output.pictures_every == 0:
            spacing = recipe.volume.spacing or (1.0, 1.0, 1.0)
            reconstruction_picture(output.picture(), folder / PICTURES / f"step-{done:08d}.png", spacing=spacing)
        if last or done % recipe.output.checkpoint_every == 0:
            state = {"method": method.state_dict(), "optimizer": optimizer.state_dict(), "spent": clock.read()}
            save_checkpoint(folder / CHECKPOINTS, done, {"step": done, **state})
    write_record(folder / RECORD_FILE, recipe, store, clock.read(), metrics.recent_loss())
    return method


def _claim(folder: Path, recipe: Recipe) -> None:
    """Makes the run's folder, or checks that the run in it is this recipe's."""
    path = folder / RECIPE_FILE
    text = recipe.to_yaml()
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise SpecError(f"{path}: another recipe ran here; choose another folder, or that recipe to go on with its run")
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _optimizer(method: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    settings = recipe.optimizer
    return create_optimizer_v2(
        method, opt="adamw", lr=settings.lr, weight_decay=settings.weight_decay, betas=settings.betas, fused=True
    )


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> CosineLRScheduler:
    """A function of the step alone, so nothing of it has to be saved."""
    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.schedule.steps,
        lr_min=recipe.schedule.min_lr,
        warmup_t=recipe.schedule.warmup,
        t_in_epochs=False,
    )


def _batches(
    recipe: Recipe, store: Store, method: nn.Module, start: int, accelerator: Accelerator
) -> Iterator[dict[str, Tensor]]:
    """Batches from step `start` on, this rank's share of each."""
    dataset = CropDataset(
        store,
        recipe.volume,
        size=method.encoder.img_size,
        length=recipe.schedule.steps * recipe.batch_size,
        seed=recipe.seed,
        views=method.views,
        crops_per_volume=recipe.data.crops_per_volume,
        mirror_axes=recipe.data.mirror_axes,
    )
    first = start * recipe.batch_size + accelerator.process_index
    loader = DataLoader(
        dataset,
        batch_size=recipe.batch_size // accelerator.num_processes,
        sampler=range(first, len(dataset), accelerator.num_processes),
        num_workers=recipe.data.workers,
        # Forking a process in which torch's threads run can hang.
        multiprocessing_context="spawn" if recipe.data.workers else None,
    )
    for batch in loader:
        yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}


def _forward(trained: nn.Module, batch: dict[str, Tensor], seed: int) -> MethodOutput:
    """One pass; what is random about a sample depends on the seed and its index alone."""
    sample_seeds = [seed * PRIME + index for index in batch["index"].tolist()]
    torch.manual_seed(sample_seeds[0])  # for dropped paths, which take torch's own generator
    return trained(batch, [torch.Generator().manual_seed(each) for each in sample_seeds])


class _Stopwatch:
    """Adds up the seconds spent inside `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.entered = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self.entered


class _Meter:
    """Speed, and time spent in `waiting`, since the last report."""

    def __init__(self, recipe: Recipe, start: int, clock: Clock) -> None:
        self.recipe, self.clock = recipe, clock
        self._restart(start)

    def _restart(self, step: int) -> None:
        self.last_step, self.last_time, self.waiting = step, time.perf_counter(), _Stopwatch()

    def report(self, step: int, loss: float, lr: float, grad_norm: float) -> Report:
        seconds, spent = time.perf_counter() - self.last_time, self.clock.read()
        report = Report(
            step=step,
            steps=self.recipe.schedule.steps,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            crops_per_second=(step - self.last_step) * self.recipe.batch_size / seconds,
            waiting=self.waiting.seconds / seconds,
            wall_seconds=spent["wall"],
            cpu_seconds=spent["cpu"],
        )
        self._restart(step)
        return report
