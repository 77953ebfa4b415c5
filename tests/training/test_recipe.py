"""Recipes: the packaged ones are valid, and mistakes are named."""

from __future__ import annotations

import pytest
import yaml

import medmim
from medmim.errors import SpecError
from medmim_training.recipe import list_recipes, load_recipe


@pytest.mark.parametrize("name", list_recipes())
def test_packaged_recipes_are_valid(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert medmim.is_model(recipe.model.name)
    assert name.rsplit("/", 1)[-1] == recipe.model.name


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
        ("volume.orientation=RRS", "needs one letter"),
        ("seed=[", "not valid YAML"),
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
