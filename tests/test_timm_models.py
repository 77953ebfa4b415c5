"""medmim's models through timm's own functions."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

import medmim
from fakes import TINY, tiny_model
from medmim import timm_models
from medmim.errors import SpecError, UnknownModelError, WeightsError

medmim.register_with_timm()  # for this process; a test may find it done, as any library that was imported


@pytest.mark.parametrize("name", medmim.list_models())
def test_every_model_is_known_and_built_with_medmims_arguments(name):
    assert timm.is_model(name)
    args = TINY[medmim.model_info(name).family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **args)
    assert model.spec == tiny_model(name, num_classes=3).spec
    for first, second in zip(model.parameters(), tiny_model(name, num_classes=3).parameters(), strict=True):
        assert torch.equal(first, second)


def test_lists_are_those_of_medmim():
    assert timm.list_models("*mae3d*", module="timm_models") == medmim.list_models("*mae3d*")
    assert timm.list_models(module="timm_models", include_tags=False) == medmim.list_models()
    assert [name for name in timm.list_pretrained() if medmim.is_model(name)] == medmim.list_pretrained()
    assert "resnet50" in timm.list_models("resnet*")


@pytest.mark.parametrize("name", medmim.list_pretrained())
def test_weights_come_by_tag_and_by_default(name):
    expected = medmim.create_model(name, pretrained=True)
    for asked in (name, name.partition(".")[0]):
        model = timm.create_model(asked, pretrained=True)
        assert model.spec == medmim.create_model(asked, pretrained=True).spec
    assert not model.training
    assert timm.get_pretrained_cfg(name).license == expected.spec.weights.license.lower()
    model = timm.create_model(name, pretrained=True, num_classes=2, img_size=(64, 48, 32))
    assert model.get_classifier().out_features == 2
    assert torch.equal(model.norm.weight, expected.norm.weight)


def test_errors_are_those_of_medmim(tiny_folder):
    with pytest.raises(UnknownModelError, match="no weights tagged 'nothing'"):
        timm.create_model("vit_t_mae3d.nothing")
    with pytest.raises(WeightsError, match="has no weights yet"):
        timm.create_model("vit_l_mae3d", pretrained=True)
    with pytest.raises(UnknownModelError, match="there is no argument 'features_only'"):
        timm.create_model("vit_t_mae3d", features_only=True)
    for mine in ({"pretrained_cfg": {"url": "x"}}, {"pretrained_cfg_overlay": {"file": "x"}}):
        with pytest.raises(SpecError, match="chosen by their tag"):
            timm.create_model("vit_t_mae3d", **mine)
    with pytest.raises(SpecError, match=r"those of a folder or a repository are loaded by medmim\.create_model"):
        timm.create_model(f"local-dir:{tiny_folder[0]}", pretrained=True)


def test_models_registered_later_follow(registry, tiny_weights, monkeypatch):
    monkeypatch.setattr(timm_models, "default_cfgs", dict(timm_models.default_cfgs))
    assert medmim.register_with_timm() == ["tiny"]
    assert medmim.register_with_timm() == []
    assert timm.create_model("tiny.fake", pretrained=True).spec == tiny_weights.model_copy(
        update={"architecture": "tiny"}
    )


def test_a_name_that_timm_has_is_not_taken():
    code = """
import medmim, timm
before = timm.list_models()
medmim.register_model("resnet18", family="vit")
try:
    medmim.register_with_timm()
except medmim.SpecError as error:
    print(error)
assert timm.list_models() == before
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == (
        "timm has a model 'resnet18' already, from timm.models.resnet; use medmim.create_model instead"
    )
