"""The Swin encoder: its windows, its pyramid and its sizes. That it gives what MONAI gives is in `test_convert.py`."""

from __future__ import annotations

import itertools

import pytest
import torch
from timm.optim import param_groups_layer_decay

import medmim
from fakes import tiny_model
from medmim.errors import SpecError
from medmim.layers.shifted_windows import Windows, relative_position_index
from medmim.layers.tokens import patchify, unpatchify
from medmim.models.swin import SwinTransformer3D, adapt_state_dict

GRIDS = {
    "divided": ((6, 4, 9), (3, 2, 3)),
    "padded": ((7, 5, 4), (3, 2, 3)),
    "one window along D": ((3, 5, 6), (7, 2, 3)),
    "one window": ((2, 3, 4), (7, 7, 4)),
}
every_grid = pytest.mark.parametrize(("grid_size", "window_size"), GRIDS.values(), ids=GRIDS.keys())
SMALL = {"patch_size": (2, 2, 2), "embed_dim": 6, "depths": (2, 1), "num_heads": (1, 2), "window_size": (3, 3, 3)}


@pytest.fixture
def model() -> SwinTransformer3D:
    return tiny_model("swin_t_simmim3d").eval()


@pytest.fixture
def x(model) -> torch.Tensor:
    return torch.rand(2, 1, *model.img_size, generator=torch.Generator().manual_seed(0))


# --- windows ----------------------------------------------------------------------------------------------------------


@every_grid
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_join_to_what_was_cut(grid_size, window_size, shifted):
    windows = Windows(grid_size, window_size, shifted=shifted)
    x = torch.rand(2, *grid_size, 3)
    cut = windows.cut(x)
    assert cut.shape[0] == sum(windows.kind_sizes)
    assert torch.equal(windows.join(cut), x)


@every_grid
@pytest.mark.parametrize("shifted", [False, True])
def test_exactly_neighbours_see_each_other(grid_size, window_size, shifted):
    """Tokens of a window are apart exactly if the shift brought them together from further than a window away."""
    windows = Windows(grid_size, window_size, shifted=shifted)
    axes = [torch.arange(side * count) for side, count in zip(windows.size, windows.counts, strict=True)]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # (Dg, Hg, Wg, 3) of the padded grid
    windows.grid_size = tuple(place.shape[:3])
    place = windows.cut(place[None]).squeeze(1)  # (M, n, 3)
    distance = (place[:, :, None] - place[:, None]).abs()  # (M, n, n, 3)
    apart = (distance >= torch.tensor(windows.size)).any(dim=-1)
    kinds = windows.barriers.repeat_interleave(torch.tensor(windows.kind_sizes), dim=0)
    assert torch.equal(kinds, torch.where(apart, -100.0, 0.0))


def test_the_number_of_biases_does_not_grow_with_the_volume():
    windows = Windows((48, 30, 40), (7, 7, 7), shifted=True)
    assert windows.barriers.shape == (8, 343, 343)
    assert windows.kind_sizes == [6 * 4 * 5, 6 * 4, 6 * 5, 6, 4 * 5, 4, 5, 1]
    assert Windows((48, 30, 7), (7, 7, 7), shifted=True).barriers.shape == (4, 343, 343)


def test_each_offset_has_its_own_bias():
    window_size = (2, 3, 4)
    index = relative_position_index(window_size)
    tokens = list(itertools.product(*map(range, window_size)))
    rows = {}
    for (i, a), (j, b) in itertools.product(enumerate(tokens), repeat=2):
        rows.setdefault(tuple(p - q for p, q in zip(a, b, strict=True)), set()).add(index[i, j].item())
    assert all(len(found) == 1 for found in rows.values())
    assert [rows[offset].pop() for offset in sorted(rows)] == list(range(3 * 5 * 7))


# --- contract ---------------------------------------------------------------------------------------------------------


def test_the_pyramid_starts_at_the_patch_embedding(model, x):
    final, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, maps[-1])
    assert [info["module"] for info in model.feature_info] == ["patch_embed", "stages.0", "stages.1"]
    assert [info["reduction"] for info in model.feature_info] == [(4, 4, 2), (8, 8, 4), (16, 16, 8)]
    assert [tuple(y.shape[1:]) for y in maps] == [(12, 8, 12, 8), (24, 4, 6, 4), (48, 2, 3, 2)]
    raw = model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(torch.layer_norm(raw[1].movedim(1, -1), (24,)).movedim(-1, 1), maps[1])


def test_odd_grids_are_rounded_up():
    model = SwinTransformer3D((10, 18, 6), **SMALL)
    maps = model.forward_intermediates(torch.rand(1, 1, 10, 18, 6), intermediates_only=True)
    assert [tuple(y.shape[2:]) for y in maps] == [(5, 9, 3), (3, 5, 2), (2, 3, 1)]


def test_replaced_patches_are_replaced_before_anything_sees_them(model, x):
    hidden = torch.zeros(2, *model.grid_size, dtype=torch.bool)
    hidden[0] = True
    token = torch.rand(1, 1, model.embed_dim)
    features = model.forward_replaced(x, hidden, token)
    torch.testing.assert_close(features[1], model.forward_features(x)[1])
    model.patch_embed.proj.weight.data.zero_()
    model.patch_embed.proj.bias.data = token.flatten()
    torch.testing.assert_close(features[0], model.forward_features(x)[0])


def test_pruning_leaves_a_smaller_encoder(model, x):
    before = model.forward_intermediates(x, [1], norm=True, intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    assert model.num_features == 24
    assert torch.equal(model.forward_features(x), before)
    model.prune_intermediate_layers([0], prune_norm=True)
    assert torch.equal(model.forward_features(x), model.forward_intermediates(x, 1, intermediates_only=True)[0])


def test_layer_decay_sorts_parameters_by_depth(model):
    model.reset_classifier(2)
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    modules = ["patch_embed.proj", "stages.0.blocks.0.mlp.fc1", "stages.0.blocks.1.attn.qkv"]
    modules += ["stages.1.blocks.0.attn.proj", "head"]
    depth = [scale[id(model.get_parameter(f"{module}.weight"))] for module in modules]
    assert depth == sorted(set(depth))
    assert depth[-1] == 1.0
    assert scale[id(model.stages[0].downsample.reduction.weight)] == depth[2]  # goes with the block before it
    assert len(model.no_weight_decay()) == 3


def test_stochastic_depth_acts_in_training_alone(x):
    model = tiny_model("swin_t_simmim3d", drop_path_rate=0.9)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), tiny_model("swin_t_simmim3d").eval()(x))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"depths": (1, 2, 1)}, "one of each a stage"),
        ({"depths": (), "num_heads": ()}, "one of each a stage"),
        ({"depths": (1, 0)}, "at least 1"),
        ({"window_size": (0, 4, 3)}, "at least 1"),
        ({"num_heads": (2, 5)}, "heads"),
        ({"img_size": (32, 50, 16)}, "not a multiple"),
        ({"global_pool": "token"}, "global_pool"),
        ({"merged": "twice"}, "'distinct' or 'repeated'"),
    ],
)
def test_constructor_refuses_what_cannot_be(args, words):
    with pytest.raises(SpecError, match=words):
        tiny_model("swin_t_simmim3d", **args)


# --- other sizes ------------------------------------------------------------------------------------------------------


def test_no_weight_depends_on_the_input_size(model):
    x = torch.rand(1, 1, 16, 40, 20)
    larger = tiny_model("swin_t_simmim3d", img_size=(16, 40, 20)).eval()
    model.set_input_size((16, 40, 20))
    assert model.grid_size == (4, 10, 10)
    assert torch.equal(model(x), larger(x))


def test_another_patch_size_keeps_the_tokens_of_resized_patches(model, x):
    before = model.forward_features(x)
    patches = patchify(x, model.patch_size).reshape(-1, 1, *model.patch_size)
    model.set_input_size((32, 96, 24), (4, 8, 3))
    patches = torch.nn.functional.interpolate(patches, size=(4, 8, 3), mode="trilinear").reshape(2, -1, 4 * 8 * 3)
    resized = unpatchify(patches, model.patch_size, model.grid_size)
    torch.testing.assert_close(model.forward_features(resized), before, rtol=1e-3, atol=1e-3)


def test_saved_and_loaded_is_bit_equal_also_with_other_sizes(model, x, tmp_path):
    medmim.save_pretrained(model, tmp_path)
    assert torch.equal(medmim.from_pretrained(tmp_path)(x), model(x))
    others = {"img_size": (16, 24, 8), "in_chans": 2, "patch_size": (2, 4, 4), "window_size": (3, 5, 3)}
    other = medmim.from_pretrained(tmp_path, **others, num_classes=3)
    assert other(torch.rand(2, 2, 16, 24, 8)).shape == (2, 3)
    half = medmim.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_other_channels_keep_the_features_of_a_repeated_input(model, x):
    wider = tiny_model("swin_t_simmim3d", in_chans=3).eval()
    wider.load_state_dict(adapt_state_dict(model.state_dict(), wider, {"window_size": model.window_size}))
    torch.testing.assert_close(wider(x.expand(-1, 3, -1, -1, -1)), model(x))


def test_position_biases_are_interpolated_to_another_window(model):
    wider = tiny_model("swin_t_simmim3d", window_size=(3, 4, 5)).eval()
    state = model.state_dict()
    key = "stages.1.blocks.0.attn.relative_position_bias_table"
    ramp = torch.arange(-2.0, 3.0)  # offsets along W in windows of 3; the others make no difference
    state[key] = ramp.repeat(5 * 7)[:, None].expand(-1, 3)
    adapted = adapt_state_dict(state, wider, {"window_size": model.window_size})
    wider.load_state_dict(adapted)
    table = adapted[key].view(5, 7, 9, 3)
    assert torch.equal(table, table[:1, :1, :, :1].expand_as(table))
    along_w = table[0, 0, :, 0]
    torch.testing.assert_close(along_w, -along_w.flip(0))
    torch.testing.assert_close(along_w[1:-1].diff(), torch.full((6,), 5 / 9))
    same = adapt_state_dict(state, model, {"window_size": model.window_size})
    assert all(torch.equal(same[name], state[name]) for name in state)
