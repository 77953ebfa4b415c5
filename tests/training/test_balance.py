"""Positions that count more: what the encoder computes is what it would with its positions multiplied."""

from __future__ import annotations

import pytest
import torch

from fakes import TINY, tiny_model
from medmim.errors import SpecError
from medmim_training.balance import raise_positions
from medmim_training.engine import build_method
from medmim_training.publish import package
from medmim_training.recipe import Recipe
from medmim_training.starting import start_from_weights
from medmim_training.tasks.classification import build_classifier
from medmim_training.tasks.probe import build_encoder
from medmim_training.tasks.recipe import ClassificationRecipe, ProbeRecipe, SegmentationRecipe
from medmim_training.tasks.segmentation import build_segmenter


@pytest.mark.parametrize("args", [{}, {"class_token": True, "num_registers": 2, "init_values": 0.3}], ids=str)
def test_the_encoder_computes_what_it_would_with_its_positions_multiplied(args):
    balanced, multiplied = (tiny_model(**args).double().eval() for _ in range(2))
    for model in (balanced, multiplied):
        for token in (model.cls_token, model.reg_token):
            if token is not None:
                torch.nn.init.normal_(token, generator=torch.Generator().manual_seed(0))
    x = torch.rand(2, 1, *TINY["vit"]["img_size"], generator=torch.Generator().manual_seed(0)).double()
    before = balanced.forward_features(x)
    raise_positions(balanced, 8.0)
    multiplied.pos_embed *= 8
    after = balanced.forward_features(x)
    # The norms add 1e-6 to variances that are 64 times as small.
    torch.testing.assert_close(after, multiplied.forward_features(x), rtol=1e-3, atol=1e-3)
    assert (after - before).abs().mean() > 0.1


@pytest.mark.parametrize("name", ["swin_t_simmim3d", "resenc_b_mae3d"])
def test_an_encoder_without_positions_is_refused(name):
    with pytest.raises(SpecError, match="position_gain is for plain transformers"):
        raise_positions(tiny_model(name), 2.0)


def test_every_kind_of_run_takes_it(recipe, finished, store, tmp_path):
    """Of the weights that it starts from, the patch embedding is divided."""
    size = {"img_size": [16, 32, 24], "patch_size": [8, 8, 8], "embed_dim": 48, "depth": 2, "num_heads": 4}
    model = {"name": "vit_t_mae3d", "pretrained": False, "args": size}
    common = {"name": "x", "summary": "x", "data": "x", "optimizer": {"lr": 1.0}, "schedule": {"steps": 1}}
    common |= {"classes": ["a", "b"], "volume": recipe.volume.to_data()}

    def segmenter(gain):
        settings = {**common, "model": {**model, "position_gain": gain}}
        return build_segmenter(SegmentationRecipe.model_validate(settings)).encoder

    def classifier(gain):
        settings = {**common, "task": "classification", "model": {**model, "position_gain": gain}}
        return build_classifier(ClassificationRecipe.model_validate(settings), ("a", "b"))

    def probed(gain):
        settings = {"data": "x", "model": {**model, "position_gain": gain}}
        return build_encoder(ProbeRecipe.model_validate(settings))

    def continued(gain):
        section = {**recipe.model.model_dump(), "weights": f"local-dir:{tmp_path}", "position_gain": gain}
        again = Recipe.model_validate({**recipe.model_dump(), "model": section})
        method = build_method(again)
        start_from_weights(method, again)
        return method.encoder

    def fresh(gain):
        section = {**recipe.model.model_dump(), "position_gain": gain}
        again = Recipe.model_validate({**recipe.model_dump(), "model": section})
        method = build_method(again)
        start_from_weights(method, again)
        return method.encoder

    package(finished[1], tmp_path, store=store, tag="synthetic", license="MIT", citation="@misc{none}")
    for build in (segmenter, classifier, probed, fresh, continued):
        plain, balanced = (build(gain).patch_embed.proj.weight for gain in (1.0, 4.0))
        torch.testing.assert_close(balanced, plain / 4, msg=build.__name__)
