"""What ships: every set of weights in the catalog, its card, its recipe, and the numbers it promised."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import medmim
from medmim import hub
from medmim.cards.encoder import PICTURE_FILE
from medmim.factory import create_decoder
from medmim.golden import golden_outputs
from medmim.hub import Folder, read_model
from medmim_training.recipe import list_recipes

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
PACKAGED = sorted(path.name for path in hub.PACKAGED.iterdir() if path.is_dir())

packaged = pytest.mark.parametrize("name", PACKAGED)


@pytest.mark.parametrize(("target", "limit"), [("wheel", 25e6), ("sdist", 60e6)])
def test_what_goes_to_a_package_index_leaves_large_weights_out(target, limit):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    excluded = project["tool"]["hatch"]["build"]["targets"][target]["exclude"]
    shipped = [name for name in PACKAGED if not any(fnmatch(f"medmim/weights/{name}", pattern) for pattern in excluded)]
    assert shipped
    assert sum(path.stat().st_size for name in shipped for path in (hub.PACKAGED / name).rglob("*")) < limit


def test_the_catalog_and_the_cards_name_the_same_weights():
    names = set(medmim.list_pretrained())
    assert {path.stem for path in CARDS.glob("*.md")} == names
    assert set(PACKAGED) <= names


@packaged
def test_one_name_in_three_places(name):
    """The catalog's record is that of the folder, and the recipe exists; tests/test_cards.py has the cards."""
    spec, _ = read_model(Folder(hub.PACKAGED / name))
    (weights,) = medmim.model_info(name).weights
    assert spec.weights == weights
    assert spec.name == name
    assert weights.training.recipe in list_recipes()


@packaged
def test_golden_outputs_are_what_was_promised(name):
    model = medmim.create_model(name, pretrained=True)
    decoder = create_decoder(model) if model.spec.weights.decoder is not None else None  # SimCLR has none
    outputs = golden_outputs(model, decoder)
    golden = load_file(hub.PACKAGED / name / hub.GOLDEN)
    assert outputs.keys() == golden.keys()
    for key, tensor in outputs.items():
        torch.testing.assert_close(tensor, golden[key], rtol=1e-3, atol=1e-4)


@packaged
def test_files_are_bfloat16_small_and_all_accounted_for(name):
    folder = hub.PACKAGED / name
    weights = medmim.model_info(name).weights[0]
    assert all(file.size < 95_000_000 for file in weights.files)  # hosts accept no file of 100 MB
    assert sum(file.size for file in weights.files) < 250_000_000
    listed = {file.name for file in weights.files} | {hub.CONFIG, "data.csv", "recipe.yaml"}
    if len(weights.encoder) > 1:
        listed.add("model.safetensors.index.json")
    assert {path.name for path in folder.iterdir()} - {PICTURE_FILE} == listed
    for file in filter(None, (*weights.encoder, weights.decoder)):
        with safe_open(folder / file.name, framework="pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"BF16"}  # noqa: SIM118


def test_no_test_case_was_trained_on():
    """Where the shared data are at hand, their manifest says which cases are for testing only."""
    import csv
    import os

    manifest = Path(os.environ.get("MEDMIM_SHARED", Path(__file__).parents[2] / "shared" / "data")) / "manifest.csv"
    if not manifest.is_file():
        pytest.skip("the shared data are not here")
    with open(manifest, newline="") as file:
        held_out = {row["sha256"] for row in csv.DictReader(file) if row["split"] == "test"}
    for name in PACKAGED:
        with open(hub.PACKAGED / name / "data.csv", newline="") as file:
            assert not held_out & {row["sha256"] for row in csv.DictReader(file)}
