"""A small store of synthetic scans, and a recipe that trains on it in seconds."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from medmim_training.engine import pretrain
from medmim_training.recipe import Recipe
from medmim_training.store.index import Store
from medmim_training.store.prepare import prepare
from medmim_training.store.sources import find_sources
from synthetic import write_scan

RECIPE = {
    "name": "tiny",
    "summary": "seconds",
    "model": {
        "name": "vit_t_mae3d",
        "args": {
            "img_size": [16, 32, 24],
            "patch_size": [8, 8, 8],
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 4,
            "drop_path_rate": 0.1,
        },
    },
    "method": {"name": "mae", "args": {"decoder": {"embed_dim": 24, "depth": 1, "num_heads": 2}}},
    "volume": {
        "orientation": "RAS",
        "spacing": [2.0, 2.0, 2.0],
        "intensity": {"CT": {"kind": "window", "low": -1000, "high": 1000}, "MR": {"kind": "percentile"}},
    },
    "data": {"workers": 0, "crops_per_volume": 2, "mirror_axes": [0]},
    "batch_size": 4,
    "optimizer": {"lr": 2.0e-3},
    "schedule": {"steps": 20, "warmup": 4},
    "precision": "fp32",
    "output": {"log_every": 1, "checkpoint_every": 5, "pictures_every": 10},
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Sums are split over threads, so results are the same to the last bit only for the same number of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its precision for the life of the process; each run here chooses its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return Recipe.model_validate(RECIPE)


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """Three scans: an MR, a small MR, a CT."""
    folder = tmp_path_factory.mktemp("scans")
    write_scan(folder / "large.nii.gz", seed=1)
    write_scan(folder / "small.nii.gz", (12, 20, 16), seed=2)
    write_scan(folder / "thorax.nii.gz", seed=3, ct=True)
    return folder


@pytest.fixture(scope="session")
def store(scans, tmp_path_factory, recipe) -> Store:
    folder = tmp_path_factory.mktemp("store")
    assert prepare(find_sources(scans), folder, volume=recipe.volume) == (3, 0)
    return Store(folder)


@pytest.fixture(scope="session")
def finished(recipe, store, tmp_path_factory):
    """The trained method and the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    trained = pretrain(recipe, store, folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    return trained, folder
