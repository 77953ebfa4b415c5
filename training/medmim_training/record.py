"""What a run leaves behind besides weights: its metrics as it goes, and what it was and cost when it ends."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

from medmim.files import output_errors, write_text
from medmim.limits import LIST_BYTES, parse_json, read_text
from medmim.spec import DataSource, Record, TrainingRecord
from medmim_training.recipe import Recipe
from medmim_training.store.index import Store

RECENT = 20  # reports that the final loss is the mean of: one batch's loss says little


@dataclass(frozen=True)
class Report:
    """What a run tells whoever watches, every `output.log_every` steps.

    Attributes:
        step: Steps done, of `steps`.
        lr: Of the part that learns fastest, where parts have rates of their own.
        crops_per_second: Since the last report.
        waiting: Share of that time spent waiting for crops.
        wall_seconds: Of the run so far, over all its sessions.
        cpu_seconds: Likewise; processes that read crops are counted when they have ended, and of several that train
            this session's first one alone.
    """

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    crops_per_second: float
    waiting: float
    wall_seconds: float
    cpu_seconds: float

    @property
    def seconds_left(self) -> float:
        """At the mean speed so far."""
        return (self.steps - self.step) * self.wall_seconds / self.step


class Clock:
    """Wall and CPU seconds of a run over all its sessions.

    Args:
        spent: What earlier sessions took, as `read` gave it.
    """

    def __init__(self, spent: dict[str, float] | None = None) -> None:
        self.spent = spent or {"wall": 0.0, "cpu": 0.0}
        self.start = self._now()

    @staticmethod
    def _now() -> dict[str, float]:
        times = os.times()
        cpu = times.user + times.system + times.children_user + times.children_system
        return {"wall": time.perf_counter(), "cpu": cpu}

    def read(self) -> dict[str, float]:
        now = self._now()
        return {key: self.spent[key] + now[key] - self.start[key] for key in now}


class Stopwatch:
    """Adds up the seconds spent inside `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.entered = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self.entered


class Meter:
    """Speed, and time spent in `waiting`, since the last report.

    Args:
        start: Steps done before this session.
        steps: Of the whole run.
        batch_size: Crops of a step.
        clock: Of the run.
    """

    def __init__(self, start: int, *, steps: int, batch_size: int, clock: Clock) -> None:
        self.steps, self.batch_size, self.clock = steps, batch_size, clock
        self._restart(start)

    def _restart(self, step: int) -> None:
        self.last_step, self.last_time, self.waiting = step, time.perf_counter(), Stopwatch()

    def report(self, step: int, loss: float, lr: float, grad_norm: float) -> Report:
        seconds, spent = time.perf_counter() - self.last_time, self.clock.read()
        report = Report(
            step=step,
            steps=self.steps,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            crops_per_second=(step - self.last_step) * self.batch_size / seconds,
            waiting=self.waiting.seconds / seconds,
            wall_seconds=spent["wall"],
            cpu_seconds=spent["cpu"],
        )
        self._restart(step)
        return report


def logged_lines(path: Path) -> list[str]:
    """The lines of a `metrics.jsonl` without the last one where a killed run cut it short; none where it is missing."""
    return [line for line in read_text(path, LIST_BYTES).splitlines() if line.endswith("}")] if path.is_file() else []


class _Logged(Record):
    """What a resumed run needs of a line of `metrics.jsonl`."""

    step: int
    loss: float


class MetricsLog:
    """`metrics.jsonl`, a line a report.

    Args:
        path: The file; lines of steps after `start`, which a resumed run does again, are dropped.
        start: Steps done before this session.
    """

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        read = [
            (line, _Logged.parse(parse_json(line, source=f"{path}:{number}"), source=f"{path}:{number}"))
            for number, line in enumerate(logged_lines(path), start=1)
        ]
        kept = [line for line, logged in read if logged.step <= start]
        self.losses = [logged.loss for _, logged in read if logged.step <= start]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, report: Report) -> None:
        self.losses.append(report.loss)
        with output_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(report)) + "\n")

    def recent_loss(self) -> float:
        """Mean of the last `RECENT` reports; infinite before the first, so that any is better."""
        recent = self.losses[-RECENT:]
        return sum(recent) / len(recent) if recent else math.inf


def write_record(
    path: Path,
    recipe: Recipe,
    store: Store,
    spent: dict[str, float],
    loss: float,
    *,
    processes: int,
    before: TrainingRecord | None = None,
) -> None:
    """Writes the `TrainingRecord` of a finished run, from which its card is made.

    Args:
        path: The file.
        recipe: Of the run.
        store: Where its crops came from.
        spent: Seconds, see `Clock.read`.
        loss: At the end.
        processes: That trained.
        before: Record of the weights that it started from.
    """
    groups = Counter((entry.group, entry.modality, entry.license) for entry in store.entries)
    record = TrainingRecord(
        method=recipe.method.name,
        recipe=recipe.name,
        steps=recipe.schedule.steps,
        crops=recipe.schedule.steps * recipe.batch_size,
        volumes=len(store.entries),
        wall_hours=round(spent["wall"] / 3600, 3),
        cpu_hours=round(spent["cpu"] / 3600, 3),
        hardware=_hardware(processes),
        final_loss=loss,
        date=date.today().isoformat(),
        data=tuple(
            DataSource(name=group or "unnamed", volumes=count, modality=modality, license=license or "unknown")
            for (group, modality, license), count in sorted(groups.items())
        ),
        before=before,
        widened=recipe.model.widen,
    )
    write_text(path, json.dumps(record.to_data(), indent=1) + "\n")


def _hardware(processes: int) -> str:
    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name()}"
    times = f"{processes} x " if processes > 1 else ""
    return f"{times}{torch.get_num_threads()} of {os.cpu_count()} CPU cores ({platform.machine()})"
