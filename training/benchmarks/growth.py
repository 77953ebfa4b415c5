"""How a step of MAE3D grows with the crop and the batch: seconds, tokens a second, activations, what the time goes to.

    python training/benchmarks/growth.py --seconds 120

Sizes whose step would take longer than `--longest` seconds, judged by their arithmetic and the speed so far, are left
out, and so is what does not fit into `--seconds` in all.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import typer
from common import RESULTS, median, seconds_of, write_result
from step import Network, breakdown, make_step, of_medmim

from medmim.memory import keep_freed_memory
from medmim_training.plan import make_plan
from medmim_training.precision import resolve_precision
from medmim_training.recipe import Recipe, load_recipe

SIDES, BATCHES = (64, 96, 128, 160), (1, 2, 4, 8, 16)


def main(
    width: int = 768,
    precision: str = "auto",
    longest: float = 20.0,
    seconds: float = 120.0,
    out: Path = RESULTS / "growth.json",
) -> None:
    """Measures, and writes the result to OUT."""
    precision = resolve_precision(precision)
    keep_freed_memory()  # as `medmim-train pretrain` does
    networks = [Network(side=side, width=width, heads=width // 64) for side in SIDES]
    plans = {
        (batch, network): make_plan(recipe_of(network, precision, batch)) for batch in BATCHES for network in networks
    }
    start, speed = time.monotonic(), math.inf
    rows, left_out = [], []
    for batch in BATCHES:
        for network in networks:
            plan = plans[batch, network]
            flops, left = plan.flops_per_crop * batch, seconds - (time.monotonic() - start)
            if flops / speed > min(longest, left / 3):  # one step to warm up, one that counts, one to see what it does
                left_out.append(f"{batch} x {network.side} cubed")
                continue
            step = make_step("medmim", *of_medmim(network), network, batch, precision)
            taken = _seconds_of(step)
            speed = flops / taken
            tokens = batch * (network.side // network.patch) ** 3
            rows.append(
                {
                    "batch": batch,
                    "side": network.side,
                    "seconds": taken,
                    "tokens_per_second": round(tokens / taken),
                    "gflops": round(speed / 1e9, 1),
                    "activation_megabytes": plan.activation_bytes >> 20,
                    "state_megabytes": plan.state_bytes >> 20,
                    "time_goes_to": breakdown(step),
                }
            )
    what = f"MAE3D, {width} wide, {networks[0].depth} deep, patches of {networks[0].patch}"
    write_result(out, {"what": what, "precision": precision, "steps": rows, "left_out": left_out})


def recipe_of(network: Network, precision: str, batch: int) -> Recipe:
    """One of the same network, and so many crops a step."""
    overrides = {
        "model.args": json.dumps(network.encoder_args),
        "method.args.ratio": network.ratio,
        "method.args.decoder": json.dumps(network.decoder_args),
        "batch_size": batch,
        "precision": precision,
    }
    return load_recipe("small/vit_b_mae3d", [f"{key}={value}" for key, value in overrides.items()])


def _seconds_of(step: Callable[[], None]) -> float:
    seconds_of(step)
    times = []
    for _ in range(3):
        times.append(seconds_of(step))
        if sum(times) > 2:
            break
    return median(times)


if __name__ == "__main__":
    typer.run(main)
