"""Optimizers and schedules, against what can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fakes import TINY
from medmim.errors import SpecError
from medmim_training.engine import build_method
from medmim_training.optimization import clip_gradients, create_optimizer, create_schedule
from medmim_training.recipe import Recipe


def with_optimizer(recipe: Recipe, **changes) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(), "optimizer": {**recipe.optimizer.model_dump(), **changes}})


def rates(recipe: Recipe, step: int) -> tuple[torch.nn.Module, dict[str, float], dict[str, float]]:
    """The method, and the rate and the decay of each weight at a step."""
    method = build_method(recipe)
    optimizer = create_optimizer(method, recipe.optimizer)
    create_schedule(optimizer, recipe.schedule).step_update(step)
    names = {id(weight): name for name, weight in method.named_parameters()}
    groups = [(names[id(weight)], group) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(name for name, _ in groups) == sorted(names.values())  # each weight once
    return method, {name: group["lr"] for name, group in groups}, {name: g["weight_decay"] for name, g in groups}


def test_rates_shrink_towards_the_input(recipe):
    method, rate, _ = rates(with_optimizer(recipe, lr=1.0, layer_decay=0.5), step=4)
    top = rate["decoder.to_voxels.weight"]
    assert rate["encoder.norm.weight"] == pytest.approx(top)
    depth = len(method.encoder.blocks)
    for number in range(depth):
        assert rate[f"encoder.blocks.{number}.mlp.fc1.weight"] == pytest.approx(top * 0.5 ** (depth - 1 - number))
    assert rate["encoder.patch_embed.proj.weight"] == pytest.approx(top * 0.5**depth)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize(
    ("name", "method", "kept"),
    [
        ("vit_t_mae3d", {"name": "mae"}, {"decoder.hidden_token"}),
        ("swin_t_simmim3d", {"name": "simmim"}, {"hidden_token", "relative_position_bias_table"}),
        ("resenc_b_mae3d", {"name": "mae_cnn", "args": {"unit": [8, 8, 8]}}, set()),
    ],
)
def test_only_matrices_decay(recipe, name, method, kept, layer_decay):
    family = name.partition("_")[0]
    model = {"name": name, "args": TINY[family]}
    changed = Recipe.model_validate({**recipe.model_dump(), "model": model, "method": method})
    built, _, decay = rates(with_optimizer(changed, layer_decay=layer_decay), step=4)
    for key, weight in built.named_parameters():
        spared = weight.ndim <= 1 or any(key.endswith(each) for each in kept)
        assert decay[key] == (0 if spared else recipe.optimizer.weight_decay), key


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_parts_have_rates_of_their_own(recipe, layer_decay):
    parts = {"decoder": 4.0, "encoder.patch_embed": 0.25, "encoder.blocks.1": 3.0}
    plain, scaled = (
        rates(with_optimizer(recipe, lr=1.0, layer_decay=layer_decay, lr_scale=scales), step=4)[1:]
        for scales in ({}, parts)
    )
    assert scaled[1] == plain[1]  # decay
    for name, rate in scaled[0].items():
        factors = [factor for part, factor in parts.items() if name.startswith(f"{part}.")]
        assert rate == pytest.approx(plain[0][name] * math.prod(factors)), name


def test_a_part_that_does_not_exist_is_refused(recipe):
    settings = with_optimizer(recipe, lr_scale={"encoder.patch": 2.0}).optimizer
    with pytest.raises(SpecError, match=r"no weight is in 'encoder.patch'; there are encoder, decoder"):
        create_optimizer(build_method(recipe), settings)


def test_sgd_takes_its_momentum_and_looks_ahead(recipe):
    optimizer = create_optimizer(build_method(recipe), with_optimizer(recipe, name="sgd", momentum=0.99).optimizer)
    assert all(group["momentum"] == 0.99 and group["nesterov"] for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ({"kind": "poly", "steps": 100}, 50, 0.5**0.9),
        ({"kind": "cosine", "steps": 100}, 50, 0.5),
        ({"kind": "cosine", "steps": 100, "warmup": 10, "min_lr": 1.0}, 70, 1.0),
        ({"kind": "poly", "steps": 100, "warmup": 10}, 5, 0.5),
    ],
)
def test_schedules(recipe, schedule, step, expected):
    recipe = Recipe.model_validate({**with_optimizer(recipe, lr=1.0).model_dump(), "schedule": schedule})
    _, rate, _ = rates(recipe, step)
    assert list(rate.values()) == pytest.approx([expected] * len(rate))


def gradients(*values: float) -> list[torch.nn.Parameter]:
    """A weight each, with that gradient, and one that has none."""
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(len(values) + 1)]
    for weight, value in zip(weights, values, strict=False):
        weight.grad = torch.tensor([value])
    return weights


def test_gradients_that_are_too_long_are_scaled_down():
    weights = gradients(3.0, 4.0)
    assert clip_gradients(weights, 1.0) == pytest.approx(5.0)
    assert [weight.grad.item() for weight in weights[:2]] == pytest.approx([0.6, 0.8])


def test_gradients_that_are_short_enough_are_not_written_to():
    weights = gradients(3.0, 4.0)
    before = [weight.grad._version for weight in weights[:2]]
    assert clip_gradients(weights, 5.0) == 5.0
    assert [weight.grad._version for weight in weights[:2]] == before


def test_a_gradient_that_is_no_number_spreads():
    weights = gradients(3.0, math.nan)
    assert math.isnan(clip_gradients(weights, 1.0))
    assert all(weight.grad.isnan().all() for weight in weights[:2])
