"""The training loop: it knows crops, a method and a schedule, and no method by name.

Everything random in step s is seeded by (seed, s), and crop i is a function of (seed, i); so a run resumed from a
checkpoint gives bit for bit the weights of one that was never stopped, with no random state to save.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader

from medmim.errors import MedmimError, SpecError
from medmim.factory import create_model
from medmim.files import atomic_write
from medmim.spec import DataSource, TrainingRecord
from medmim_training.checkpoint import load_latest, save_checkpoint
from medmim_training.methods import MethodOutput, create_method
from medmim_training.recipe import Recipe
from medmim_training.store.crops import CropDataset
from medmim_training.store.index import Store

RECIPE_FILE, METRICS_FILE, RECORD_FILE = "recipe.yaml", "metrics.jsonl", "record.json"
CHECKPOINTS, PICTURES = "checkpoints", "pictures"


@dataclass(frozen=True)
class Progress:
    """What a step tells whoever watches.

    Attributes:
        step: Steps done, of `steps`.
        crops_per_second: Since the last report.
        waiting: Share of that time spent waiting for crops.
        seconds_left: At the present speed.
    """

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    crops_per_second: float
    waiting: float
    seconds_left: float


class NonFiniteLossError(MedmimError):
    """The loss became NaN or infinite; the message names the scans of the batch."""


def build_method(recipe: Recipe) -> nn.Module:
    """The recipe's method around its freshly initialised encoder; the same weights for the same seed."""
    torch.manual_seed(recipe.seed)
    return create_method(recipe.method.name, create_model(recipe.model.name, **recipe.model.args), recipe.method.args)


def pretrain(
    recipe: Recipe, store: Store, folder: str | Path, *, watch: Callable[[Progress], None] = lambda progress: None
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
    _claim(folder, recipe)
    accelerator = Accelerator(mixed_precision="no" if recipe.precision == "fp32" else recipe.precision)
    method = build_method(recipe)
    optimizer = create_optimizer_v2(
        method,
        opt="adamw",
        lr=recipe.optimizer.lr,
        weight_decay=recipe.optimizer.weight_decay,
        betas=recipe.optimizer.betas,
        fused=True,
    )
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=recipe.schedule.steps,
        lr_min=recipe.schedule.min_lr,
        warmup_t=recipe.schedule.warmup,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    checkpoint = load_latest(folder / CHECKPOINTS)
    start, spent = 0, {"wall": 0.0, "cpu": 0.0}
    if checkpoint is not None:
        start, spent = checkpoint["step"], checkpoint["spent"]
        method.load_state_dict(checkpoint["method"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    encoder = method.encoder
    trained, optimizer = accelerator.prepare(method, optimizer)
    trained.train()

    crops = _crops(recipe, store, encoder.img_size, start, accelerator)
    clock = _Clock(spent)
    log = _Log(folder / METRICS_FILE, start)
    waited, last_report, loss = 0.0, time.perf_counter(), math.nan
    for step in range(start, recipe.schedule.steps):
        before = time.perf_counter()
        batch = next(crops)
        waited += time.perf_counter() - before

        schedule.step_update(step + 1)  # counted from 1, so that the first step already has a rate above zero
        output = _forward(trained, batch, recipe.seed, step)
        loss = output.loss.item()
        if not math.isfinite(loss):
            names = sorted({store.entries[i].source for i in batch["volume"].tolist()})
            raise NonFiniteLossError(f"step {step + 1}: the loss is {loss}; look at {', '.join(names)}, or lower the rate")
        accelerator.backward(output.loss)
        grad_norm = accelerator.clip_grad_norm_(trained.parameters(), recipe.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        if done % recipe.output.log_every == 0 or done == recipe.schedule.steps:
            now = time.perf_counter()
            since, last_report = now - last_report, now
            steps = done - max(start, done - 1 - (done - 1) % recipe.output.log_every)
            progress = Progress(
                step=done,
                steps=recipe.schedule.steps,
                loss=loss,
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=float(grad_norm),
                crops_per_second=steps * recipe.batch_size / since,
                waiting=waited / since,
                seconds_left=(recipe.schedule.steps - done) * since / steps,
            )
            waited = 0.0
            log.write(progress, clock.read())
            watch(progress)
        if output.picture is not None and done % recipe.output.pictures_every == 0:
            _draw(output, folder / PICTURES / f"step-{done:08d}.png", recipe)
        if done % recipe.output.checkpoint_every == 0 or done == recipe.schedule.steps:
            state = {
                "step": done,
                "method": method.state_dict(),
                "optimizer": optimizer.state_dict(),
                "spent": clock.read(),
                "loss": log.recent_loss(),
            }
            save_checkpoint(folder / CHECKPOINTS, done, state)
    if start < recipe.schedule.steps:
        _write_record(folder, recipe, store, clock.read(), log.recent_loss())
    return method


def _claim(folder: Path, recipe: Recipe) -> None:
    """Makes the run's folder, or checks that the run in it is this recipe's."""
    path = folder / RECIPE_FILE
    text = recipe.to_yaml()
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise SpecError(f"{path}: another recipe ran here; choose another folder, or that recipe to go on with its run")
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _crops(recipe: Recipe, store: Store, size, start: int, accelerator: Accelerator) -> Iterator[dict[str, torch.Tensor]]:
    """Batches from step `start` on; each rank gets its own crops."""
    dataset = CropDataset(
        store,
        recipe.volume,
        size=size,
        length=recipe.schedule.steps * recipe.batch_size,
        seed=recipe.seed,
        crops_per_volume=recipe.data.crops_per_volume,
        mirror_axes=recipe.data.mirror_axes,
    )
    first = start * recipe.batch_size + accelerator.process_index
    indices = range(first, len(dataset), accelerator.num_processes)
    loader = DataLoader(
        dataset,
        batch_size=recipe.batch_size // accelerator.num_processes,
        sampler=indices,
        num_workers=recipe.data.workers,
        drop_last=True,
        # Forking a process with torch's threads running can hang; spawned workers import torch once a run.
        multiprocessing_context="spawn" if recipe.data.workers else None,
        generator=torch.Generator(),
    )
    for batch in loader:
        yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}


def _forward(trained: nn.Module, batch: dict[str, torch.Tensor], seed: int, step: int) -> MethodOutput:
    # Two streams: torch's own for dropped paths, and a generator for what is hidden.
    step_seed = int(torch.Generator().manual_seed(seed).initial_seed()) * 1_000_003 + step
    torch.manual_seed(step_seed)
    return trained(batch, torch.Generator().manual_seed(step_seed))


class _Clock:
    """Wall and CPU seconds of a run over all its sessions."""

    def __init__(self, spent: dict[str, float]) -> None:
        self.spent, self.wall, self.cpu = spent, time.perf_counter(), self._cpu()

    @staticmethod
    def _cpu() -> float:
        # Reading processes count when they have ended, and so are missing until then.
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    def read(self) -> dict[str, float]:
        return {
            "wall": self.spent["wall"] + time.perf_counter() - self.wall,
            "cpu": self.spent["cpu"] + self._cpu() - self.cpu,
        }


class _Log:
    """`metrics.jsonl`: a line a report; lines of steps that a resumed run does again are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        self.rows = [row for row in rows if row["step"] <= start]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def write(self, progress: Progress, spent: dict[str, float]) -> None:
        row: dict[str, Any] = {
            "step": progress.step,
            "loss": progress.loss,
            "lr": progress.lr,
            "grad_norm": progress.grad_norm,
            "crops_per_second": round(progress.crops_per_second, 2),
            "waiting": round(progress.waiting, 4),
            "wall_seconds": round(spent["wall"], 1),
            "cpu_seconds": round(spent["cpu"], 1),
        }
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def recent_loss(self) -> float:
        """Mean of the last 20 reports: one batch's loss says little."""
        losses = [row["loss"] for row in islice(reversed(self.rows), 20)]
        return sum(losses) / len(losses) if losses else math.nan


def _draw(output: MethodOutput, path: Path, recipe: Recipe) -> None:
    from medmim.pictures import reconstruction_picture

    reconstruction_picture(output.picture(), path, spacing=recipe.volume.spacing or (1.0, 1.0, 1.0))


def _write_record(folder: Path, recipe: Recipe, store: Store, spent: dict[str, float], loss: float) -> None:
    groups: dict[tuple[str, str, str], int] = {}
    for entry in store.entries:
        key = entry.group, entry.modality, entry.license
        groups[key] = groups.get(key, 0) + 1
    record = TrainingRecord(
        method=recipe.method.name,
        recipe=recipe.name,
        steps=recipe.schedule.steps,
        crops=recipe.schedule.steps * recipe.batch_size,
        volumes=len(store.entries),
        wall_hours=round(spent["wall"] / 3600, 3),
        cpu_hours=round(spent["cpu"] / 3600, 3),
        hardware=_hardware(),
        final_loss=loss,
        date=date.today().isoformat(),
        data=tuple(
            DataSource(name=name or "unnamed", volumes=count, modality=modality, license=license or "unknown")
            for (name, modality, license), count in sorted(groups.items())
        ),
    )
    with atomic_write(folder / RECORD_FILE) as path:
        path.write_text(json.dumps(record.to_data(), indent=1) + "\n", encoding="utf-8")


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread(s)"
