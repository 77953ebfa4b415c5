"""What a run needs, counted, against what can be worked out by hand."""

from __future__ import annotations

import pytest

from medmim_training.plan import make_plan, matrix_product_rate
from medmim_training.recipe import Recipe


def test_parameters_and_memory_of_the_state(recipe, finished):
    plan = make_plan(recipe)
    assert plan.parameters == sum(p.numel() for p in finished[0].parameters())
    assert plan.encoder_parameters == sum(p.numel() for p in finished[0].encoder.parameters())
    assert plan.state_bytes == 16 * plan.parameters
    assert make_plan(Recipe.model_validate({**recipe.model_dump(), "ema": 0.9})).state_bytes == 20 * plan.parameters
    assert plan.crops == 80


def test_arithmetic_is_that_of_the_formula(recipe):
    """Linear layers: 2 FLOPs a weight and token forward, twice that backward; attention: 4 products of N x N x C."""
    visible, tokens, voxels, hidden = 6, 24, 512, 18
    encoder = visible * (voxels * 48 + 2 * 12 * 48**2)
    decoder = visible * 48 * 24 + tokens * 12 * 24**2 + hidden * 24 * voxels
    attention = 2 * 2 * visible**2 * 48 + 2 * tokens**2 * 24
    expected = 3 * 2 * (encoder + decoder + attention)
    expected -= 2 * visible * voxels * 48  # nobody needs the gradient of the voxels
    assert make_plan(recipe).flops_per_crop == pytest.approx(expected, rel=0.05)


def test_activations_follow_the_batch_and_its_parts(recipe):
    whole = make_plan(recipe).activation_bytes
    split = make_plan(Recipe.model_validate({**recipe.model_dump(), "accumulate": 2})).activation_bytes
    assert whole == pytest.approx(2 * split, rel=0.01)


def test_fewer_bits_take_less_memory_however_large_the_batch(recipe):
    """Weights are copied to bf16 once, not once a sample."""
    wide = {"name": "vit_t_mae3d", "args": {**recipe.model.args, "embed_dim": 384}}  # weights outweigh activations
    for batch_size in (1, 32):
        many = Recipe.model_validate({**recipe.model_dump(), "model": wide, "batch_size": batch_size})
        half = Recipe.model_validate({**many.model_dump(), "precision": "bf16"})
        whole, plan = make_plan(many).activation_bytes, make_plan(half)
        assert plan.activation_bytes < whole + 2 * plan.parameters


def test_hours_are_arithmetic_over_rate(recipe):
    plan = make_plan(recipe)
    assert plan.hours(plan.flops_per_crop * plan.crops) * 3600 == pytest.approx(1)
    assert matrix_product_rate("fp32", size=64, seconds=0.01) > 1e6
