"""Recipes: the packaged ones are valid, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import medmim
from medmim.errors import SpecError
from medmim_training.methods import METHODS
from medmim_training.plan import make_plan
from medmim_training.recipe import list_recipes, load_recipe

CARDS = Path(__file__).parents[2] / "model_cards"
METHODS_OF_TAGS = {"mae": ("mae", "mae_cnn"), "simmim": ("simmim",), "simclr": ("simclr",)}


def model_of(recipe_name: str) -> str:
    """What a recipe of this name trains: "small/vit_t_mae3d" and "small/vit_t_mae3d_again" are about vit_t_mae3d."""
    last = recipe_name.rsplit("/", 1)[-1]
    return max((name for name in medmim.list_models() if f"{last}_".startswith(f"{name}_")), key=len)


@pytest.mark.parametrize("name", list_recipes())
def test_packaged_recipes_are_valid_and_what_their_name_says(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.model.name == model_of(name)
    (tag,) = medmim.model_info(recipe.model.name).tags
    assert recipe.method.name in METHODS_OF_TAGS[tag]


SLOW_TO_PLAN = [name for name in list_recipes() if "swin" in name]  # its windows are many small operations


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_TO_PLAN)) for name in list_recipes()]
)
def test_packaged_recipes_can_be_planned(name):
    plan = make_plan(load_recipe(name))
    assert plan.flops_per_crop > 1e9
    if name.startswith("small/"):
        hours = plan.hours(30e9)  # FLOP/s that one core of an old server reaches
        assert hours < 24, f"{name}: {hours:.0f} hours are not small"


def test_every_method_of_the_paper_has_a_recipe_at_its_scale_and_a_small_one():
    at_scale = {"vit_b_mae3d", "vit_b_simmim3d", "swin_b_simmim3d", "vit_b_simclr3d", "resenc_l_mae3d"}
    assert at_scale <= set(list_recipes())
    small = {load_recipe(name).method.name for name in list_recipes() if name.startswith("small/")}
    assert small == set(METHODS)


def test_catalog_recipes_and_cards_name_the_same():
    """Weights that are published have a card, and were made by a recipe that is here."""
    for full_name in medmim.list_pretrained():
        (weights,) = medmim.model_info(full_name).weights
        assert (CARDS / f"{full_name}.md").is_file()
        assert weights.training.recipe in list_recipes()
        assert model_of(weights.training.recipe) == medmim.model_info(full_name).name
    for card in CARDS.glob("*.md"):
        assert card.stem in medmim.list_pretrained()


def test_a_recipe_round_trips(tmp_path):
    recipe = load_recipe("small/vit_t_mae3d", ["seed=3"])
    path = tmp_path / "copy.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=3e-4", ("optimizer", "lr"), 3e-4),
        ("schedule.steps=7", ("schedule", "steps"), 7),
        ("method.args.ratio=0.9", ("method", "args", "ratio"), 0.9),
        ("data={workers: 0}", ("data", "workers"), 0),
    ],
)
def test_overrides(override, key, value):
    data = load_recipe("small/vit_t_mae3d", [override]).model_dump()
    for part in key:
        data = data[part]
    assert data == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate is no key"),
        ("schedule.step=1", "did you mean 'steps'"),
        ("batchsize=1", "did you mean 'batch_size'"),
        ("optimizer.lr=-1", "optimizer.lr: Input should be greater than 0"),
        ("schedule.steps", "write key=value"),
        ("seed.x=1", "is a value, not a section"),
        ("seed=99999999999999", "seed: Input should be less than"),
        ("volume.orientation=RRS", "needs one letter"),
        ("seed=[", "not valid YAML"),
        ("volume.spacin=[1,1,1]", "volume.spacin is no key of a recipe; did you mean 'spacing'"),
        ("volume.intensity.MR.hihg=99", r"intensity\.MR\.percentile\.hihg is no key of a recipe; did you mean 'high'"),
        ("volume.intensity.CT.width=9", r"intensity\.CT\.window\.width is no key of a recipe; known: kind, low, high"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(SpecError, match=message):
        load_recipe("small/vit_t_mae3d", [override])


def test_a_missing_recipe_names_the_nearest():
    with pytest.raises(SpecError, match="small/vit_t_mae3d"):
        load_recipe("small/vit_t_mae")


def test_a_file_that_is_no_recipe(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump([1, 2]))
    with pytest.raises(SpecError, match="a recipe is a mapping"):
        load_recipe(str(path))
