"""How long a segmenter takes for a whole volume, window by window, and how much memory, beside MONAI's way.

    python training/benchmarks/segmenting.py

The same network both times: ViT-T/16 with a UNETR decoder and random weights, windows of 96 cubed that overlap by half,
Gaussian weights. MONAI's `sliding_window_inference` sums the scores of all classes over the whole volume, of which the
argmax is taken then; medmim sums them over a band. Each run is in a process of its own, which is set up as its users
get it: `medmim segment` has the allocator keep freed memory, so MONAI's way is measured with that, too.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import RESULTS, compare, spread, write_result
from monai.inferers import sliding_window_inference
from resident import PeakSince
from torch import Tensor, nn

import medmim
from medmim.labelling import predict_labels
from medmim.memory import keep_freed_memory

OVERLAP = 0.5


def main(
    side: Annotated[int, typer.Option(help="Of the volume, in voxels.")] = 192,
    window: Annotated[int, typer.Option(help="Of the network, in voxels.")] = 96,
    classes: int = 14,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Path = RESULTS / "segmenting.json",
) -> None:
    """Measures, and writes the result to OUT."""
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in WAYS}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for _ in range(rounds):
            for name in WAYS:
                runs[name].append(pool.submit(run, name, side, window, classes, torch.get_num_threads()).result())
    result = {
        "what": f"a volume of {side} cubed, {classes} classes, ViT-T/16 with UNETR, windows of {window} cubed",
        **compare({name: [seconds for seconds, _ in each] for name, each in runs.items()}, "medmim"),
        "peak_megabytes": {name: spread([peak / 2**20 for _, peak in each]) for name, each in runs.items()},
    }
    write_result(out, result)


def run(name: str, side: int, window: int, classes: int, threads: int) -> tuple[float, int]:
    """The seconds that a way takes for a volume, and the bytes that it adds to resident memory at its peak."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = medmim.create_segmenter("vit_t_mae3d", "unetr", num_classes=classes, img_size=(window,) * 3)
    x = torch.rand(1, side, side, side)
    if name in KEEP_MEMORY:
        keep_freed_memory()
    label = WAYS[name]
    label(model.eval(), x[:, :window, :window, :window])  # so that nothing is done for the first time
    peak = PeakSince()
    start = time.perf_counter()
    labels = label(model, x)
    seconds = time.perf_counter() - start
    assert labels.shape == x.shape[1:]
    return seconds, peak.bytes()


def with_monai(model: nn.Module, x: Tensor) -> Tensor:
    """(D, H, W) labels of a volume (1, D, H, W)."""
    with torch.inference_mode():
        scores = sliding_window_inference(x[None], model.img_size, 1, model, overlap=OVERLAP, mode="gaussian")
        return scores[0].argmax(dim=0)


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "medmim": lambda model, x: predict_labels(model, x, overlap=OVERLAP),
    "MONAI": with_monai,
    "MONAI, memory kept": with_monai,
}
KEEP_MEMORY = {"medmim", "MONAI, memory kept"}

if __name__ == "__main__":
    typer.run(main)
