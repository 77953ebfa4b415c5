"""The share of a run's time that it spends waiting for crops, with one process that reads ahead.

python training/benchmarks/waiting.py STORE
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from common import RESULTS, spread, write_result

from medmim_training.engine import pretrain
from medmim_training.recipe import load_recipe
from medmim_training.record import Report
from medmim_training.store.index import Store


def main(
    store: Annotated[Path, typer.Argument(help="Made by `medmim-train prepare`.")],
    recipe: str = "small/vit_t_mae3d",
    steps: int = 20,
    out: Path = RESULTS / "waiting.json",
) -> None:
    """Trains a few steps, and writes the result to OUT; the first step, which starts the reader, does not count."""
    chosen = load_recipe(recipe, [f"schedule={{steps: {steps}}}", "data.workers=1", "output.log_every=1"])
    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as folder:
        pretrain(chosen, Store(store), folder, watch=reports.append)
    counted = reports[1:]
    result = {
        "what": f"{recipe}, {len(counted)} steps of {chosen.batch_size}, 1 worker",
        "share_waiting": spread([report.waiting for report in counted]),
        "crops_per_second": spread([report.crops_per_second for report in counted]),
    }
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
