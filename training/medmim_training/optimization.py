"""Optimizer and schedule of a recipe: timm's; and the clipping of gradients, torch's."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from medmim.errors import SpecError
from medmim_training.recipe import OptimizerSection, ScheduleSection
from medmim_training.sharding import whole

NNUNET_POWER = 0.9  # of the polynomial (Isensee et al. 2021)


def create_optimizer(method: nn.Module, settings: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer over all weights of a method, a segmenter or a classifier; those that are frozen are left out.

    Raises:
        SpecError: For an optimizer that does not exist, one that refuses its arguments, or a part without weights.
    """
    # timm hands on what the optimizer's constructor takes; only torch's own have fused kernels.
    extra = {"fused": True} if settings.name in ("adam", "adamw") else {}
    try:
        return create_optimizer_v2(
            method,
            opt=settings.name,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            betas=settings.betas,
            param_group_fn=partial(_groups, settings=settings) if settings.layer_decay or settings.lr_scale else None,
            **extra,
        )
    except SpecError:
        raise
    except (ValueError, TypeError) as error:
        raise SpecError(f"optimizer: {error}; timm.optim.list_optimizers() has the names") from error


def _groups(method: nn.Module, *, settings: OptimizerSection) -> list[dict[str, Any]]:
    if settings.layer_decay:
        groups = _by_layer(method, settings)
    else:
        groups = param_groups_weight_decay(method, settings.weight_decay, no_weight_decay_list=method.no_weight_decay())
    for part, scale in settings.lr_scale.items():
        groups = _scaled(groups, method, part, scale)
    return groups


def _scaled(groups: list[dict[str, Any]], method: nn.Module, part: str, scale: float) -> list[dict[str, Any]]:
    """The same groups, those that a part has weights in split in two."""
    inside = {id(weight) for name, weight in method.named_parameters() if f"{name}.".startswith(f"{part}.")}
    if not inside:
        parts = ", ".join(name for name, child in method.named_children() if any(True for _ in child.parameters()))
        raise SpecError(f"optimizer.lr_scale: no weight is in {part!r}; there are {parts}, and parts of them")
    split = []
    for group in groups:
        for chosen in (False, True):
            weights = [weight for weight in group["params"] if (id(weight) in inside) is chosen]
            factor = group.get("lr_scale", 1.0) * (scale if chosen else 1.0)
            split.append({**group, "params": weights, "lr_scale": factor})
    return [group for group in split if group["params"]]


def _by_layer(method: nn.Module, settings: OptimizerSection) -> list[dict[str, Any]]:
    """Groups of parameters: the encoder's at rates that shrink towards its input, all others at the full rate."""
    encoder = getattr(method, "encoder", method)  # an encoder's classifier is the layer behind its last
    groups = param_groups_layer_decay(
        encoder, settings.weight_decay, encoder.no_weight_decay(), layer_decay=settings.layer_decay
    )
    if encoder is method:
        return groups
    others = [(name, weight) for name, weight in method.named_parameters() if not name.startswith("encoder.")]
    undecayed = {name for name, weight in others if weight.ndim <= 1} | method.no_weight_decay()
    for weight_decay, chosen in ((settings.weight_decay, False), (0.0, True)):
        weights = [weight for name, weight in others if (name in undecayed) is chosen]
        groups.append({"params": weights, "weight_decay": weight_decay})
    return groups


def create_schedule(optimizer: torch.optim.Optimizer, settings: ScheduleSection) -> Scheduler:
    """The rate as a function of the step alone, so nothing of it has to be saved; the last step's is `min_lr`."""
    common = {
        "t_initial": settings.steps,
        "lr_min": settings.min_lr,
        "warmup_t": settings.warmup,
        "t_in_epochs": False,
    }
    if settings.kind == "poly":
        return PolyLRScheduler(optimizer, power=NNUNET_POWER, **common)
    return CosineLRScheduler(optimizer, **common)


def clip_gradients(weights: Iterable[nn.Parameter], most: float) -> float:
    """Scales gradients down to a norm of `most`, in place; those within it are not written to, which takes time.

    Args:
        weights: Split ones (DTensors) too; all processes must call this.
        most: Above 0.

    Returns:
        The norm over all of them, before.
    """
    weights = [weight for weight in weights if weight.grad is not None]
    norm = get_total_norm([weight.grad for weight in weights])
    length = float(whole(norm))
    if not length <= most:  # or it is no number, which then spreads to all weights
        clip_grads_with_norm_(weights, most, norm)
    return length
