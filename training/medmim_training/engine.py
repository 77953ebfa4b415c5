"""The training loop: it knows crops, a method and a schedule, and no method by name.

Everything random about sample i, its crop and what is hidden of it, is seeded by (seed, i); so a run resumed from a
checkpoint gives bit for bit the weights of one that was never stopped (on as many threads, since sums are split over
them), with no random state to save, and a batch split over ranks or accumulated in parts is the batch of one process,
but for dropped paths, which are drawn for a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Event

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from medmim.errors import MedmimError, SpecError
from medmim.factory import create_model
from medmim.pictures import reconstruction_picture
from medmim_training.checkpoint import load_latest, save_checkpoint
from medmim_training.claims import claim, claim_store
from medmim_training.loading import batches
from medmim_training.methods import MethodOutput, create_method
from medmim_training.optimization import clip_gradients, create_optimizer, create_schedule
from medmim_training.precision import forget_precision, usable_precision
from medmim_training.preemption import Preempted, stop_requests
from medmim_training.recipe import Recipe
from medmim_training.record import Clock, Meter, MetricsLog, Report, write_record
from medmim_training.sharding import load_whole, repeated_parts, shard, whole
from medmim_training.starting import start_from_weights, with_origin
from medmim_training.store.crops import CropDataset
from medmim_training.store.index import Store

RECIPE_FILE, CLAIM_FILE, METRICS_FILE, RECORD_FILE = "recipe.yaml", "store.json", "metrics.jsonl", "record.json"
CHECKPOINTS, PICTURES, TRACKER = "checkpoints", "pictures", "curves"

PRIME = 15_485_863  # keeps the samples of different seeds apart


class NonFiniteLossError(MedmimError):
    """The loss, or its gradient, became NaN or infinite; the message names the scans of the batch."""


def build_method(recipe: Recipe) -> nn.Module:
    """The recipe's method around its freshly initialised encoder; the same weights for the same seed."""
    torch.manual_seed(recipe.seed)
    return create_method(recipe.method.name, create_model(recipe.model.name, **recipe.model.args), recipe.method.args)


def pretrain(
    recipe: Recipe,
    store: Store,
    folder: str | Path,
    *,
    sharded: bool = False,
    watch: Callable[[Report], None] = lambda report: None,
) -> nn.Module:
    """Trains, or goes on training, and writes everything to `folder`.

    Under `accelerate launch` or `torchrun` every process calls this; the first one writes.

    Args:
        recipe: What to train.
        store: Crops come from here.
        folder: `recipe.yaml`, `store.json` (which store), `metrics.jsonl`, `checkpoints/`, `pictures/` and, at the
            end, `record.json`. When it holds a checkpoint of the same recipe and store, training resumes there.
        sharded: Splits weights, gradients and moments over the processes (FSDP2), for what is too large for one GPU;
            a run may go on with another choice and another number of processes.
        watch: Called by the first process every `output.log_every` steps.

    Returns:
        The trained method; with `ema`, its average. With `sharded`, of its weights this process's share (DTensors).

    Raises:
        SpecError: When the folder holds a run of another recipe or store, or the store, the batch, the precision or
            the number of processes does not fit.
        NonFiniteLossError: When the loss or its gradient is no number any more.
        CheckpointError: When the disk is full.
        Preempted: After SIGTERM or Ctrl-C; the run has saved itself.
    """
    return _Run(recipe, store, Path(folder), sharded=sharded).train(watch)


@dataclass(frozen=True)
class _Step:
    """What an optimizer step gave: the last part's output, and the mean loss over parts and processes.

    `stopped` says whether any process was told to stop, so that all of them stop after the same step.
    """

    output: MethodOutput
    loss: float
    grad_norm: float
    stopped: bool


class _Run:
    """One run: what it is made of, and the loop over it."""

    def __init__(self, recipe: Recipe, store: Store, folder: Path, *, sharded: bool) -> None:
        recipe = with_origin(recipe)
        self.recipe, self.store, self.folder, self.sharded = recipe, store, folder, sharded
        store.check(recipe.volume)
        self.accelerator = self._accelerator()
        self.part_size = self._part_size()
        self.writes = self.accelerator.is_main_process
        if self.writes:
            claim(folder / RECIPE_FILE, recipe, kind=Recipe)
            claim_store(folder / CLAIM_FILE, store)
        self.accelerator.init_trackers(TRACKER)

        checkpoint = load_latest(folder / CHECKPOINTS) or {}
        self.start, self.best = checkpoint.get("step", 0), checkpoint.get("best", math.inf)
        self.clock = Clock(checkpoint.get("spent") if self.writes else None)  # earlier sessions count once
        self.method = build_method(recipe)
        self._check_method()
        self.before = start_from_weights(self.method, recipe)
        self.method.to(self.accelerator.device)  # before it is copied: an average elsewhere could not be updated
        self.average = ModelEmaV3(self.method, decay=recipe.ema) if recipe.ema else None
        if checkpoint:
            self.method.load_state_dict(checkpoint["method"])
        if checkpoint and self.average is not None:
            self.average.module.load_state_dict(checkpoint["average"])
        if recipe.compile:
            for part in repeated_parts(self.method.encoder):
                part.compile()
        if sharded:
            shard(self.method, self.accelerator.device)
            if self.average is not None:
                shard(self.average.module, self.accelerator.device)
        optimizer = create_optimizer(self.method, recipe.optimizer)
        self.schedule = create_schedule(optimizer, recipe.schedule)
        if checkpoint:
            load_whole(optimizer, checkpoint["optimizer"])
        # What is split needs no DDP around it, only autocast within.
        self.trained = self.accelerator.prepare_model(self.method, evaluation_mode=sharded)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        if self.accelerator.scaler is not None and checkpoint.get("scaler"):
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self.metrics = MetricsLog(folder / METRICS_FILE, self.start) if self.writes else None
        self.meter = Meter(self.start, steps=recipe.schedule.steps, batch_size=recipe.batch_size, clock=self.clock)

    def _accelerator(self) -> Accelerator:
        recipe, precision = self.recipe, usable_precision(self.recipe)
        if precision == "fp16" and self.sharded:
            raise SpecError(f"{recipe.name}: split weights are not trained in fp16; use precision=bf16")
        for tracker in recipe.output.trackers:
            if find_spec(tracker) is None:
                raise SpecError(f"output.trackers: {tracker} is not installed; pip install {tracker}, or leave it out")
        forget_precision()
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=list(recipe.output.trackers) or None,
            project_dir=self.folder,
            cpu=not torch.cuda.is_available(),  # without it, accelerate takes processes on CPUs for unrelated ones
        )
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise SpecError(
                f"accelerate is configured for {accelerator.distributed_type.value}; configure plain processes and "
                "split the weights with --shard"
            )
        if self.sharded and accelerator.num_processes == 1:
            raise SpecError("--shard splits weights over processes, and there is one; start several with torchrun")
        return accelerator

    def _check_method(self) -> None:
        """Refuses what the method cannot do with this recipe or these scans."""
        recipe, channels = self.recipe, self.method.encoder.in_chans
        if self.method.compares_samples and recipe.accumulate > 1:
            raise SpecError(
                f"{recipe.name}: {recipe.method.name} compares all samples of a batch, which parts one after the "
                "other do not have at once; set accumulate to 1, and take more processes or a smaller batch_size"
            )
        if self.method.compares_samples and recipe.batch_size < 2:
            raise SpecError(f"{recipe.name}: {recipe.method.name} compares samples; set batch_size to 2 or more")
        for entry in self.store.entries:
            if entry.channels != channels:
                raise SpecError(
                    f"{self.store.folder}: {entry.source} has {entry.channels} channels and the encoder takes "
                    f"{channels}; set model.args.in_chans, or prepare a store of scans that fit"
                )

    def _part_size(self) -> int:
        """Samples that this process computes at once."""
        parts = self.recipe.accumulate * self.accelerator.num_processes
        size, rest = divmod(self.recipe.batch_size, parts)
        if rest:
            raise SpecError(
                f"batch_size {self.recipe.batch_size} does not divide into {parts} parts "
                f"({self.accelerator.num_processes} process(es), accumulate {self.recipe.accumulate})"
            )
        return size

    def train(self, watch: Callable[[Report], None]) -> nn.Module:
        every, steps = self.recipe.output, self.recipe.schedule.steps
        self.trained.train()
        # Closing the parts ends the processes that read crops, whose CPU time then counts.
        with closing(self._parts()) as parts, stop_requests() as stop:
            for done in range(self.start + 1, steps + 1):
                step = self._step(parts, done, stop)
                finished = done == steps
                if self.writes and (finished or step.stopped or done % every.log_every == 0):
                    watch(self._report(step, done))
                if self.writes and done % every.pictures_every == 0:
                    self._draw(step, done)
                if finished or step.stopped or done % every.checkpoint_every == 0:
                    self._save(done)
                if step.stopped and not finished:
                    self.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended
                    raise Preempted(f"{self.folder}: stopped and saved at step {done}; the same command goes on")
        spent, record = self._spent(), self.folder / RECORD_FILE
        if self.writes and not (self.start == steps and record.is_file()):  # of a finished run, it stays as it is
            write_record(
                record,
                self.recipe,
                self.store,
                spent,
                self.metrics.recent_loss(),
                processes=self.accelerator.num_processes,
                before=self.before,
            )
        self.accelerator.end_training()
        return self.method if self.average is None else self.average.module

    def _step(self, parts: Iterator[dict[str, Tensor]], done: int, stop: Event) -> _Step:
        self.schedule.step_update(done)  # from 1, so that the first step already has a rate above zero
        total, stopped = 0.0, False
        for part in range(self.recipe.accumulate):
            with self.meter.waiting:
                batch = next(parts)
            with self._exchanging(part == self.recipe.accumulate - 1):
                output = self._forward(batch)
                self.accelerator.backward(output.loss / self.recipe.accumulate)
            loss = output.loss.detach().float()
            loss, asked = self.accelerator.reduce(torch.stack([loss, loss.new_tensor(stop.is_set())]), "mean").tolist()
            if not math.isfinite(loss):
                self._refuse("loss", loss, batch, done)
            total += loss
            stopped |= asked > 0
        self.accelerator.unscale_gradients()
        grad_norm = clip_gradients(self.trained.parameters(), self.recipe.optimizer.clip_grad)
        # Before it spreads to the weights, and with them to a checkpoint. A scaler leaves such a step out by itself.
        if not math.isfinite(grad_norm) and self.accelerator.scaler is None:
            self._refuse("gradient", grad_norm, batch, done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.method)
        return _Step(output, total / self.recipe.accumulate, grad_norm, stopped)

    @contextmanager
    def _exchanging(self, last: bool) -> Iterator[None]:
        """Processes exchange gradients after the `last` part of a step only."""
        if self.sharded:
            self.trained.set_requires_gradient_sync(last)
            yield
        else:
            with nullcontext() if last else self.accelerator.no_sync(self.trained):
                yield

    def _forward(self, batch: dict[str, Tensor]) -> MethodOutput:
        sample_seeds = [self.recipe.seed * PRIME + index for index in batch["index"].tolist()]
        torch.manual_seed(sample_seeds[0])  # for dropped paths, which take torch's own generator
        return self.trained(batch, [torch.Generator().manual_seed(each) for each in sample_seeds])

    def _refuse(self, what: str, value: float, batch: dict[str, Tensor], done: int) -> None:
        scans = sorted({self.store.entries[i].source for i in batch["volume"].tolist()})
        raise NonFiniteLossError(f"step {done}: the {what} is {value}; look at {', '.join(scans)}, or lower the rate")

    def _parts(self) -> Iterator[dict[str, Tensor]]:
        """What this process computes, part by part, from the first step on that is not done."""
        dataset = CropDataset(
            self.store,
            self.recipe.volume,
            size=self.method.encoder.img_size,
            length=self.recipe.schedule.steps * self.recipe.batch_size,
            seed=self.recipe.seed,
            views=self.method.views,
            crops_per_volume=self.recipe.data.crops_per_volume,
            foreground_power=self.recipe.data.foreground_power,
            foreground_share=self.recipe.data.foreground_share,
            mirror_axes=self.recipe.data.mirror_axes,
        )
        first = self.start * self.recipe.batch_size + self.accelerator.process_index
        order = range(first, len(dataset), self.accelerator.num_processes)
        device = self.accelerator.device
        return batches(dataset, order, size=self.part_size, workers=self.recipe.data.workers, device=device)

    def _report(self, step: _Step, done: int) -> Report:
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        report = self.meter.report(done, step.loss, lr, step.grad_norm)
        self.metrics.write(report)
        logs = {name: float(value) for name, value in step.output.logs.items()}
        self.accelerator.log({"loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm, **logs}, step=done)
        return report

    def _draw(self, step: _Step, done: int) -> None:
        if step.output.picture is None:
            return
        path, volume = self.folder / PICTURES / f"step-{done:08d}.png", self.recipe.volume
        spacing = volume.spacing or (1.0, 1.0, 1.0)
        reconstruction_picture(step.output.picture(), path, spacing=spacing, orientation=volume.orientation)

    def _spent(self) -> dict[str, float]:
        """Seconds of the run so far, those of the CPU over all processes. All must call this."""
        spent = self.clock.read()
        return spent | {"cpu": sum(gather_object([spent["cpu"]]))}

    def _save(self, done: int) -> None:
        state = {
            "step": done,
            "method": self.method.state_dict(),
            "average": self.average.module.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
        }
        state, spent = whole(state), self._spent()
        if not self.writes:
            return
        recent = self.metrics.recent_loss()
        is_best, self.best = recent <= self.best, min(recent, self.best)
        state |= {"best": self.best, "spent": spent}
        save_checkpoint(self.folder / CHECKPOINTS, done, state, keep=self.recipe.output.keep, best=is_best)
