"""The residual encoder beyond the contract of test_models.py; the same numbers as dynamic-network-architectures gives.

Volumes are not cubic, strides are anisotropic, and weights are random everywhere (zero branches would hide mistakes).
"""

from __future__ import annotations

import pytest
import torch
from timm.optim import param_groups_layer_decay

import medmim
from medmim.convert.dynamic_network_architectures import from_residual_encoder, to_residual_encoder
from medmim.errors import SpecError, WeightsError
from medmim.models.resenc import ResidualEncoder3D, adapt_state_dict
from resenc_peer import TINY, randomise, reference

PATCH, GRID = (2, 4, 4), (4, 6, 4)


def tiny(**args) -> ResidualEncoder3D:
    return randomise(medmim.create_model("resenc_l_mae3d", **{**TINY, **args})).eval()


@pytest.fixture
def model() -> ResidualEncoder3D:
    return tiny(in_chans=2)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 2, *TINY["img_size"], generator=torch.Generator().manual_seed(1))


# --- its own ----------------------------------------------------------------------------------------------------------


def test_forward_is_the_head_of_the_last_map(model, x):
    features = model.forward_features(x)
    assert features.shape == (2, 12, *GRID)
    assert (model.patch_size, model.grid_size, model.num_features, model.num_prefix_tokens) == (PATCH, GRID, 12, 0)
    assert torch.equal(model(x), features.mean(dim=(2, 3, 4)))


def test_intermediates_are_the_pyramid_fine_to_coarse(model, x):
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(final, maps[-1])
    strides = [info["reduction"] for info in model.feature_info]
    assert strides == [(1, 1, 1), (2, 2, 2), (2, 4, 4), (2, 4, 4)]
    assert [y.shape[2:] for y in maps] == [
        tuple(side // step for side, step in zip(TINY["img_size"], stride, strict=True)) for stride in strides
    ]
    with pytest.raises(ValueError, match="do not name stages"):
        model.forward_intermediates(x, [4])


def test_pruning_leaves_a_smaller_encoder(model, x):
    before = model.forward_intermediates(x, [1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert (model.patch_size, model.grid_size, model.num_features) == ((2, 2, 2), (4, 12, 8), 8)
    assert torch.equal(model.forward_features(x), before)


def test_a_new_model_starts_with_zero_branches_that_learn(x):
    model = medmim.create_model("resenc_l_mae3d", **TINY, in_chans=2)
    block = model.stages[1][1]  # neither strides nor widens
    y = torch.rand(1, 8, 4, 4, 4)
    assert torch.equal(block(y), y)
    model(x).square().sum().backward()
    assert block.conv2.norm.weight.grad.any()


def test_layer_decay_sorts_parameters_by_depth(model):
    model.reset_classifier(2)
    for group in (model.group_matcher(), model.group_matcher(coarse=True)):
        assert group.keys() == {"stem", "blocks"}
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    keys = ["stem.conv", "stages.0.0.conv1.conv", "stages.1.0.shortcut.1.conv", "stages.1.1.conv2.conv", "head"]
    depth = [scale[id(model.get_parameter(f"{key}.weight"))] for key in keys]
    assert depth == sorted(set(depth))
    assert depth[-1] == 1.0


def test_input_size_follows_the_strides(model, x):
    model.set_input_size((4, 8, 12))
    assert model.grid_size == (2, 2, 3)
    assert torch.equal(model.forward_features(x[:, :, :4, :8, :12]).mean(dim=(2, 3, 4)), model(x[:, :, :4, :8, :12]))
    for size, words in (((4, 8, 10), "not a multiple"), ((2, 4, 4), "one voxel")):
        with pytest.raises(ValueError, match=words):
            model.set_input_size(size)
    model.set_input_size(patch_size=PATCH)
    with pytest.raises(ValueError, match="patch_size"):
        model.set_input_size(patch_size=(4, 4, 4))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"depths": (1, 2, 1)}, "one of each a stage"),
        ({"depths": (1, 2, 0, 2)}, "at least 1"),
        ({"strides": (1, 2, 0, 2)}, "at least 1"),
        ({"img_size": (8, 24, 18)}, "not a multiple"),
        ({"img_size": (2, 4, 4)}, "one voxel"),
        ({"global_pool": "token"}, "global_pool"),
    ],
)
def test_constructor_refuses_what_cannot_be(args, words):
    with pytest.raises(SpecError, match=words):
        medmim.create_model("resenc_l_mae3d", **{**TINY, **args})


def test_saved_and_loaded_is_bit_equal_also_with_other_sizes(model, x, tmp_path):
    medmim.save_pretrained(model, tmp_path)
    loaded = medmim.from_pretrained(tmp_path)
    assert torch.equal(loaded(x), model(x))
    smaller = medmim.from_pretrained(tmp_path, img_size=(4, 8, 8), in_chans=1, num_classes=3)
    assert smaller(x[:, :1, :4, :8, :8]).shape == (2, 3)


def test_other_channels_keep_the_features_of_a_repeated_input():
    """The stem is linear in its channels, so what follows it cannot tell."""
    saved, model = tiny(in_chans=1), tiny(in_chans=3)
    model.load_state_dict(adapt_state_dict(saved.state_dict(), model, {}))
    x = torch.rand(1, 1, *TINY["img_size"])
    torch.testing.assert_close(model(x.expand(-1, 3, -1, -1, -1)), saved(x))


# --- dynamic-network-architectures ------------------------------------------------------------------------------------


def test_every_stage_gives_what_the_peer_gives(model, x):
    theirs = randomise(reference(**TINY, in_chans=2))
    ours = from_residual_encoder(theirs.encoder.state_dict())
    model.load_state_dict(ours)
    for a, b in zip(model.forward_intermediates(x, intermediates_only=True), theirs.encoder(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert a.std() > 0.1  # a map of zeros would agree with anything
    whole = from_residual_encoder(theirs.state_dict())
    assert whole.keys() == ours.keys()
    assert all(torch.equal(whole[key], ours[key]) for key in ours)


def test_weights_go_to_the_peer_and_back(model, x):
    theirs = reference(**TINY, in_chans=2).encoder
    state = model.state_dict()
    theirs.load_state_dict(to_residual_encoder(state))
    torch.testing.assert_close(theirs(x)[-1], model.forward_features(x), rtol=0, atol=1e-5)
    back = from_residual_encoder(theirs.state_dict())
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", medmim.list_models("resenc_*"))
def test_models_of_the_catalog_have_the_tensors_of_the_plan(name):
    args = medmim.model_info(name).args
    with torch.device("meta"):
        model, theirs = medmim.create_model(name), reference(**args).encoder.state_dict()
    converted = to_residual_encoder(model.state_dict())
    assert {key: tensor.shape for key, tensor in converted.items()} == {key: t.shape for key, t in theirs.items()}
    # The planner's rule: an axis is halved while at least 4 voxels remain.
    assert all(4 <= side < 8 for side in model.grid_size)


def test_names_of_one_tensor_that_differ_are_refused():
    theirs = reference(**TINY, in_chans=2).state_dict()
    for key in (
        "encoder.stem.convs.0.all_modules.0.weight",
        "encoder.stages.1.blocks.0.skip.1.norm.weight",
        "decoder.encoder.stages.3.blocks.1.conv2.conv.bias",
    ):
        with pytest.raises(WeightsError, match="two names of one tensor") as error:
            from_residual_encoder({**theirs, key: theirs[key] + 1})
        assert key in str(error.value)
    deduplicated = {key: tensor for key, tensor in theirs.items() if ".all_modules." not in key}
    assert from_residual_encoder(deduplicated).keys() == from_residual_encoder(theirs).keys()


def test_nothing_is_dropped_in_silence(model):
    theirs = reference(**TINY, in_chans=2).state_dict()
    for key in ("encoder.stages.0.blocks.0.squeeze_excitation.conv_reduce.weight", "module.encoder.x", "extra"):
        with pytest.raises(WeightsError, match=key):
            from_residual_encoder({**theirs, key: torch.zeros(1)})
    model.reset_classifier(2)
    with pytest.raises(WeightsError, match="reset_classifier"):
        to_residual_encoder(model.state_dict())


def test_weights_of_another_plan_do_not_load(model):
    """Strides have no weights, but where a shortcut averages is in the names."""
    strides = (1, 1, (1, 2, 2), 2)
    theirs = reference(**{**TINY, "strides": strides}, in_chans=2).encoder.state_dict()
    with pytest.raises(RuntimeError, match="shortcut"):
        model.load_state_dict(from_residual_encoder(theirs))
