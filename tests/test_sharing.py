"""The verbs of huggingface_hub's mixin on models: medmim's functions, by other names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import medmim
from fakes import TINY, save_tiny, tiny_model
from medmim.errors import UnknownModelError, WeightsError
from medmim.layers.sharing import Shareable
from medmim.models.resenc import ResidualEncoder3D
from medmim.models.vit import VisionTransformer3D

ONE_OF_EACH = sorted(
    {medmim.model_info(name).family: name for name in reversed(medmim.list_models())}.values(),
)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_saved_and_loaded_by_its_own_methods(name, tmp_path):
    model = tiny_model(name, num_classes=2).eval()
    assert model.save_pretrained(tmp_path) == medmim.from_pretrained(tmp_path).spec
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert type(model).from_pretrained(str(tmp_path), num_classes=5).num_classes == 5
    with pytest.raises(UnknownModelError, match="no argument 'num_class'"):
        type(model).from_pretrained(tmp_path, num_class=5)


def test_all_families_have_the_methods():
    assert {medmim.model_info(name).family for name in ONE_OF_EACH} == TINY.keys()
    assert all(isinstance(tiny_model(name), Shareable) for name in ONE_OF_EACH)


def test_the_record_and_the_decoder_go_along(tmp_path):
    spec = save_tiny(tmp_path / "first")
    model = VisionTransformer3D.from_pretrained(tmp_path / "first", revision=None, local_files_only=True)
    decoder = medmim.create_decoder(model)
    again = model.save_pretrained(tmp_path / "again", decoder=decoder, weights=spec.weights)
    assert again.weights.decoder == spec.weights.decoder
    assert again.weights.license == spec.weights.license


def test_a_model_of_another_class_is_refused(tmp_path):
    save_tiny(tmp_path)
    with pytest.raises(WeightsError, match=r"holds a VisionTransformer3D, not a ResidualEncoder3D"):
        ResidualEncoder3D.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="neither a folder that exists nor a repository"):
        VisionTransformer3D.from_pretrained(tmp_path / "missing")


def test_pushing_is_what_medmim_does(monkeypatch):
    calls = []

    def push_to_hub(*args, **kwargs):
        calls.append((args, kwargs))
        return "published"

    monkeypatch.setattr(medmim, "push_to_hub", push_to_hub, raising=False)
    model = tiny_model()
    how = {"private": True, "token": "t", "create_pr": True, "commit_message": "m"}
    assert model.push_to_hub("org/name", **how) == "published"
    assert calls == [((model, "org/name"), how)]


def test_models_alone_import_nothing_of_medmim_but_layers():
    code = """
import sys
import medmim.models.vit, medmim.models.swin, medmim.models.resenc
print(*sorted(name for name in sys.modules if name.startswith("medmim.")))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert all(name.startswith(("medmim.layers", "medmim.models")) for name in done.stdout.split())
