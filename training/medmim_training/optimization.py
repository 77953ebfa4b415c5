"""Optimizer and schedule of a recipe: timm's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from medmim.errors import SpecError
from medmim_training.recipe import OptimizerSection, ScheduleSection

NNUNET_POWER = 0.9  # of the polynomial (Isensee et al. 2021)


def create_optimizer(
    method: nn.Module, settings: OptimizerSection, *, head: Sequence[nn.Module] = (), head_scale: float = 1.0
) -> torch.optim.Optimizer:
    """The optimizer over all weights of a method, a segmenter or a classifier; those that are frozen are left out.

    Args:
        method: What is trained.
        settings: Of the recipe.
        head: Parts of it that have a rate of their own.
        head_scale: That rate, as a multiple of the others'.

    Raises:
        SpecError: For an optimizer that does not exist, or one that refuses its arguments.
    """
    groups = partial(_groups, settings=settings, head=head, head_scale=head_scale)
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
            param_group_fn=groups if settings.layer_decay or head_scale != 1 else None,
            **extra,
        )
    except (ValueError, TypeError) as error:
        raise SpecError(f"optimizer: {error}; timm.optim.list_optimizers() has the names") from error


def _groups(
    method: nn.Module, *, settings: OptimizerSection, head: Sequence[nn.Module], head_scale: float
) -> list[dict[str, Any]]:
    if settings.layer_decay:
        groups = _by_layer(method, settings)
    else:
        groups = param_groups_weight_decay(method, settings.weight_decay, no_weight_decay_list=method.no_weight_decay())
    if head_scale == 1:
        return groups
    of_head = {id(weight) for part in head for weight in part.parameters()}
    split = []
    for group in groups:
        new = [weight for weight in group["params"] if id(weight) in of_head]
        old = [weight for weight in group["params"] if id(weight) not in of_head]
        split += [{**group, "params": old}, {**group, "params": new, "lr_scale": head_scale}]
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
    """The rate as a function of the step alone, so nothing of it has to be saved."""
    common = {
        "t_initial": settings.steps,
        "lr_min": settings.min_lr,
        "warmup_t": settings.warmup,
        "t_in_epochs": False,
    }
    if settings.kind == "poly":
        return PolyLRScheduler(optimizer, power=NNUNET_POWER, **common)
    return CosineLRScheduler(optimizer, **common)
