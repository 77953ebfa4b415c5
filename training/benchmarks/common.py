"""What all benchmarks share: rounds in which every candidate takes its turn, ratios with their spread, and records.

Candidates take turns within one process, so that whatever else the machine does falls on all of them; a ratio is that
of two times of the same round.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medmim.files import write_text

RESULTS = Path(__file__).parent / "results"

Times = dict[str, list[float]]  # of each candidate, seconds of each round


def take_turns(candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1) -> Times:
    """Runs all candidates in turn, `rounds` times after `warmup` rounds that do not count."""
    times: Times = {name: [] for name in candidates}
    for number in range(warmup + rounds):
        for name, run in candidates.items():
            seconds = seconds_of(run)
            if number >= warmup:
                times[name].append(seconds)
    return times


def seconds_of(run: Callable[[], Any]) -> float:
    """How long it takes, on the GPU too."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles, to four digits."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": _short(median), "quartiles": [_short(low), _short(high)]}


def compare(times: Times, own: str) -> dict[str, Any]:
    """Seconds of every candidate, and how many times as long as `own` each of the others takes."""
    ratios = {
        name: spread([other / ours for other, ours in zip(values, times[own], strict=True)])
        for name, values in times.items()
        if name != own
    }
    return {"seconds": {name: spread(values) for name, values in times.items()}, f"times_{own}": ratios}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load": [round(load, 1) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Adds a record to those of a benchmark, in place of an older one of the same machine, and prints it."""
    record = {"date": date.today().isoformat(), "machine": machine(), **result}
    others = [other for other in read_records(path) if _identity(other) != _identity(record)] if path.exists() else []
    write_text(path, json.dumps([*others, record], indent=1) + "\n")
    print(json.dumps(record, indent=1))


def read_records(path: Path) -> list[dict[str, Any]]:
    """What a benchmark has measured, a record for each machine."""
    return json.loads(path.read_text(encoding="utf-8"))


def _identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record["machine"][key] for key in ("processor", "cores", "gpu", "instructions"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def median(values: list[float]) -> float:
    """The median, to four digits."""
    return _short(statistics.median(values))
