"""A wide transformer computes what the narrow one did that it starts from."""

from __future__ import annotations

import pytest
import torch

import medmim
from fakes import TINY, tiny_decoder, tiny_model
from medmim.errors import SpecError
from medmim.heads.mae import MAEDecoder
from medmim_training.engine import build_method, pretrain
from medmim_training.publish import package
from medmim_training.recipe import Recipe
from medmim_training.starting import start_from_weights
from medmim_training.widening import widen_decoder, widen_encoder

VIT = TINY["vit"]
WIDE = {"embed_dim": 3 * VIT["embed_dim"], "num_heads": 3 * VIT["num_heads"]}


def volumes(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 1, *VIT["img_size"], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "args",
    [
        {"pos_embed": "learned"},
        {"pos_embed": "learned", "class_token": True, "num_registers": 2, "init_values": 0.3},
        {"pos_embed": "learned", "qkv_bias": False},
    ],
    ids=["plain", "tokens", "no bias"],
)
def test_features_are_those_of_the_narrow_one_copied(args):
    narrow, wide = tiny_model(**args).eval(), tiny_model(**{**args, **WIDE}).eval()
    for parameter in narrow.parameters():  # biases, too, have something to lose
        torch.nn.init.normal_(parameter, std=0.2)
    wide.load_state_dict(widen_encoder(narrow, wide, seed=0))
    expected = narrow.forward_features(volumes()).repeat_interleave(3, dim=-1)
    torch.testing.assert_close(wide.forward_features(volumes()), expected, rtol=1e-4, atol=1e-4)


def test_copies_do_not_stay_copies():
    narrow, wide = tiny_model(pos_embed="learned"), tiny_model(pos_embed="learned", **WIDE)
    wide.load_state_dict(widen_encoder(narrow, wide, seed=0))
    wide.forward_features(volumes()).square().mul(torch.linspace(0, 1, wide.num_features)).mean().backward()
    for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight"):
        rows = dict(wide.named_parameters())[name].grad.flatten(1)
        assert rows.unique(dim=0).shape == rows.shape, name


def test_the_decoder_predicts_the_same_from_more_channels():
    narrow = tiny_model()
    decoder = tiny_decoder(narrow).eval()
    wide = MAEDecoder(
        **{**MAEDecoder.of_encoder(narrow), "encoder_dim": 3 * narrow.num_features},
        embed_dim=24,
        depth=1,
        num_heads=2,
    ).eval()
    wide.load_state_dict(widen_decoder(decoder.state_dict(), 3, seed=0))
    tokens = torch.randn(2, 5, narrow.num_features, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(narrow.pos_embed.shape[1], generator=torch.Generator().manual_seed(0)).expand(2, -1)
    idx_keep, idx_hidden = order[:, :5], order[:, 5:]
    torch.testing.assert_close(
        wide(tokens.repeat_interleave(3, dim=-1), idx_keep, idx_hidden), decoder(tokens, idx_keep, idx_hidden)
    )


@pytest.mark.parametrize(
    "args",
    [
        {**WIDE, "num_heads": VIT["num_heads"]},
        {**WIDE, "embed_dim": 2 * VIT["embed_dim"]},
        {"embed_dim": VIT["embed_dim"] * 3 // 2, "num_heads": 3},
        {**WIDE, "depth": 3},
        {**WIDE, "patch_size": (8, 8, 8)},
    ],
    ids=["heads", "width", "fraction", "depth", "patch"],
)
def test_what_differs_in_more_than_width_is_refused(args):
    with pytest.raises(SpecError, match="can be widened only to"):
        widen_encoder(tiny_model(), tiny_model(**args), seed=0)


def test_a_convolutional_network_is_not_widened():
    with pytest.raises(SpecError, match="can be widened only to"):
        widen_encoder(tiny_model("resenc_b_mae3d"), tiny_model(**WIDE), seed=0)


def test_a_run_starts_from_narrower_weights_and_says_so(finished, recipe, store, tmp_path):
    package(finished[1], tmp_path / "narrow", store=store, tag="synthetic", license="MIT", citation="@misc{none}")
    args = {**recipe.model.args, "embed_dim": 96, "num_heads": 8}
    model = {"name": "vit_t_mae3d", "args": args, "weights": f"local-dir:{tmp_path / 'narrow'}", "widen": True}
    wide = Recipe.model_validate({**recipe.model_dump(), "model": model, "schedule": {"steps": 1}})
    method = build_method(wide)
    before = start_from_weights(method, wide)
    assert before.steps == recipe.schedule.steps
    narrow = medmim.create_model(f"local-dir:{tmp_path / 'narrow'}", pretrained=True)
    x = torch.rand(1, 1, *narrow.img_size, generator=torch.Generator().manual_seed(0))
    # The positions of the wide one lie between those of the narrow one, so only nearly.
    close = method.encoder.eval().forward_features(x) - narrow.forward_features(x).repeat_interleave(2, dim=-1)
    assert close.square().mean() < 0.02
    pretrain(wide, store, tmp_path / "run")
    package(tmp_path / "run", tmp_path / "wide", store=store, tag="wide", license="MIT", citation="@misc{none}")
    training = medmim.create_model(f"local-dir:{tmp_path / 'wide'}", pretrained=True).spec.weights.training
    assert training.widened
    assert training.before == before
    assert "The network of run 2 is wider" in (tmp_path / "wide" / "README.md").read_text("utf-8")


def test_a_decoder_that_cannot_be_widened_starts_anew(recipe, store, tmp_path):
    simmim = Recipe.model_validate({**recipe.model_dump(), "method": {"name": "simmim"}, "schedule": {"steps": 1}})
    pretrain(simmim, store, tmp_path / "run")
    package(tmp_path / "run", tmp_path / "narrow", store=store, tag="synthetic", license="MIT", citation="@misc{none}")
    args = {**recipe.model.args, "embed_dim": 96, "num_heads": 8}
    model = {"name": "vit_t_mae3d", "args": args, "weights": f"local-dir:{tmp_path / 'narrow'}", "widen": True}
    method = build_method(Recipe.model_validate({**simmim.model_dump(), "model": model}))
    fresh = {name: weight.clone() for name, weight in method.decoder.state_dict().items()}
    start_from_weights(method, Recipe.model_validate({**simmim.model_dump(), "model": model}))
    assert all(torch.equal(weight, fresh[name]) for name, weight in method.decoder.state_dict().items())
