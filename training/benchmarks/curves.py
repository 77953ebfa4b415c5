"""Loss curves of runs, as a picture; the contrastive loss has a panel of its own, since its scale is another.

python training/benchmarks/curves.py runs/vit_t_mae3d runs/vit_t_simmim3d runs/vit_t_simclr3d
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import RESULTS
from matplotlib.figure import Figure

from medmim.errors import SpecError
from medmim.files import atomic_write
from medmim_training.engine import METRICS_FILE, RECIPE_FILE
from medmim_training.recipe import Recipe, load_recipe
from medmim_training.record import logged_lines

SMOOTHED = 10  # reports that a point is the mean of


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `medmim-train pretrain` wrote.")],
    out: Path = RESULTS / "curves.png",
) -> None:
    """Draws the runs' losses over crops seen, and writes the picture to OUT."""
    found = [(run, *read_run(run)) for run in runs]
    panels = sorted({recipe.method.name == "simclr" for _, recipe, _, _ in found})
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, contrastive in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        for run, recipe, crops, loss in found:
            if (recipe.method.name == "simclr") is contrastive:
                axes.plot(crops, smooth(loss), label=f"{run.name} ({recipe.method.name})", linewidth=1)
        axes.set_xscale("log")  # methods differ in how many crops they see in a time
        axes.set_yscale("linear" if contrastive else "log")
        axes.set_xlabel("crops seen")
        axes.set_ylabel("NT-Xent" if contrastive else "loss on hidden voxels")
        axes.legend(frameon=False)
    with atomic_write(out) as path:
        figure.savefig(path, format="png", dpi=130)
    print(out)


def read_run(run: Path) -> tuple[Recipe, np.ndarray, np.ndarray]:
    """Recipe, crops seen and loss of a run.

    Raises:
        SpecError: When the folder holds no run.
    """
    if not (run / METRICS_FILE).is_file():
        raise SpecError(f"{run}: no run ({METRICS_FILE} is missing)")
    recipe = load_recipe(str(run / RECIPE_FILE))
    reports = [json.loads(line) for line in logged_lines(run / METRICS_FILE)]
    crops = np.array([report["step"] * recipe.batch_size for report in reports])
    return recipe, crops, np.array([report["loss"] for report in reports])


def smooth(values: np.ndarray) -> np.ndarray:
    """Each value's mean with those before it, `SMOOTHED` at most."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - SMOOTHED, 0)
    return (sums[last] - sums[first]) / (last - first)


if __name__ == "__main__":
    typer.run(main)
