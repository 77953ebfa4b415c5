"""What a recipe will need, before anything starts: one step is traced and counted, the rest is multiplication.

Tracing is with tensors that have a size and no content, so the largest network is planned in seconds and no memory.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from medmim_training.engine import build_method
from medmim_training.precision import DTYPES, Precision, resolve_precision
from medmim_training.recipe import Recipe

SAMPLES = 2  # of which one is the share


@dataclass(frozen=True)
class Plan:
    """The needs of a run.

    Attributes:
        encoder_parameters: Of what is published.
        parameters: Of all that is trained.
        flops_per_crop: Forward and backward, matrix products and attention, as torch's counter has them.
        activation_bytes: Kept for the backward pass of one part of a batch (`accumulate`), copies of the weights in
            the number format of the arithmetic included.
        state_bytes: Weights, gradients and the two moments of Adam in float32, and the average where there is one.
        crops: Of the whole run.
    """

    encoder_parameters: int
    parameters: int
    flops_per_crop: int
    activation_bytes: int
    state_bytes: int
    crops: int

    def hours(self, flops_per_second: float) -> float:
        """Of a run whose arithmetic goes on at this rate throughout: a lower bound."""
        return self.crops * self.flops_per_crop / flops_per_second / 3600


def make_plan(recipe: Recipe) -> Plan:
    """Traces two samples and four forward and backward, and counts, for one process."""
    with torch.device("meta"):
        method = build_method(recipe)
    encoder = method.encoder
    with FakeTensorMode(allow_non_fake_inputs=True):  # which the meta tensors are
        method.to_empty(device="cpu")
        x = torch.empty(2 * SAMPLES, method.views.count, encoder.in_chans, *encoder.img_size)
        flops, saved = _count(method, {"x": x[:SAMPLES]}, recipe)
        _, saved_of_more = _count(method, {"x": x}, recipe)
    per_sample = (saved_of_more - saved) // SAMPLES  # the rest, copies of weights, is there once for any number
    part = math.ceil(recipe.batch_size / recipe.accumulate)
    parameters = sum(parameter.numel() for parameter in method.parameters())
    copies = 4 if recipe.ema is None else 5
    return Plan(
        encoder_parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        parameters=parameters,
        flops_per_crop=flops // SAMPLES,
        activation_bytes=saved + per_sample * (part - SAMPLES),
        state_bytes=copies * 4 * parameters,
        crops=recipe.schedule.steps * recipe.batch_size,
    )


def _count(method: torch.nn.Module, batch: dict[str, Tensor], recipe: Recipe) -> tuple[int, int]:
    """FLOPs, and bytes kept between the passes; weights are not counted with the latter."""
    own = {StorageWeakRef(parameter.untyped_storage()) for parameter in method.parameters()}
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (reference := StorageWeakRef(storage)) not in own:
            kept[reference] = storage.nbytes()
        return tensor

    precision = DTYPES[resolve_precision(recipe.precision)]
    with FlopCounterMode(display=False) as counter:
        with (
            torch.autocast("cpu", precision, enabled=precision is not torch.float32),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            loss = method(batch).loss
        loss.backward()
    return counter.get_total_flops(), sum(kept.values())


def matrix_product_rate(precision: Precision, *, size: int = 2048, seconds: float = 1.0) -> float:
    """FLOP/s of square matrix products on the device at hand, the best of those that fit into about `seconds`.

    Args:
        precision: As in a recipe.
        size: Rows and columns.
        seconds: How long to measure.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2, size, size, device=device, dtype=DTYPES[resolve_precision(precision)])
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        c = a @ b
        c[0, 0].item()  # waits for a GPU
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
