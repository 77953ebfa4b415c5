"""The contract every encoder of the catalog keeps, at a tiny size, non-cubic, with anisotropic patches or strides.

A new architecture gets these tests by being in the catalog and having a tiny form in `fakes.TINY`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import medmim
from fakes import tiny_model
from medmim.layers.adapt import adapt_in_chans, resize_patch_kernel
from medmim.layers.position import sincos_position
from medmim.models.vit import VisionTransformer3D, adapt_state_dict

# Forms of a family that are worth testing besides the plain one.
FORMS = {
    "vit": {
        "plain": {},
        "tokens": {"class_token": True, "num_registers": 2, "global_pool": "token"},
        "learned": {"pos_embed": "learned", "init_values": 0.1, "in_chans": 2, "global_pool": "attn"},
    },
}
OTHERWISE = {"plain": {}, "channels": {"in_chans": 2}}


def cases(names: list[str], having: Callable[[nn.Module], bool] = lambda model: True, but: str | None = None):
    """Parametrises a test's `model` over the forms, all but one on request, of the models that have something."""
    chosen = {
        f"{name}-{label}": (name, args)
        for name in names
        if having(tiny_model(name))
        for label, args in FORMS.get(medmim.model_info(name).family, OTHERWISE).items()
        if label != but
    }
    return pytest.mark.parametrize("model", chosen.values(), ids=chosen.keys(), indirect=True)


every_model = cases(medmim.list_models())
# To the compiler another number of channels is the same graph.
one_of_each_family = cases(
    list({medmim.model_info(name).family: name for name in medmim.list_models()}.values()), but="channels"
)
every_token_model = cases(medmim.list_models(), having=lambda model: hasattr(model, "forward_visible"))


@pytest.fixture
def model(request) -> nn.Module:
    name, args = request.param
    model = tiny_model(name, **args)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # zeros, which some start from, would hide mistakes
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture
def x(model) -> torch.Tensor:
    return torch.rand(2, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(0))


@every_model
def test_forward_is_the_head_of_the_features(model, x):
    features = model.forward_features(x)
    assert torch.equal(model(x), model.forward_head(features))
    assert model(x).shape == (2, model.num_features)
    assert model.head_hidden_size == model.num_features


@every_model
def test_classifier_can_be_replaced(model, x):
    features = model(x)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), features)
    assert model.get_classifier().out_features == model.num_classes == 5
    model.reset_classifier(0)
    assert torch.equal(model(x), features)


@every_model
def test_a_pool_that_does_not_exist_is_refused(model, x):
    features = model(x)
    for pool in ("", "max"):  # timm's features without a pool, which another method gives here
        with pytest.raises(ValueError, match=f"global_pool is '{pool}'; it must be 'avg'.*, forward_features goes"):
            model.reset_classifier(0, pool)
    assert torch.equal(model(x), features)


@every_model
def test_intermediates_have_the_channels_and_strides_they_say(model, x):
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(maps) == len(model.feature_info)
    for i, (y, info) in enumerate(zip(maps, model.feature_info, strict=True)):
        grid = [side // stride for side, stride in zip(model.img_size, info["reduction"], strict=True)]
        assert y.shape == (2, info["num_chs"], *grid)
        assert isinstance(model.get_submodule(info["module"]), nn.Module)
        ((tokens, prefix),) = model.forward_intermediates(
            x, [i], output_fmt="NLC", return_prefix_tokens=True, stop_early=True, intermediates_only=True
        )
        assert torch.equal(tokens, y.flatten(2).mT)
        assert prefix.shape == (2, model.num_prefix_tokens, info["num_chs"])
    for two in (2, np.int64(2)):
        last_two = model.forward_intermediates(x, two, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(last_two, maps[-2:], strict=True))
    normed = model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)[0]
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    if getattr(model, "global_pool", "avg") == "avg":
        torch.testing.assert_close(normed.mean(dim=(2, 3, 4)), pooled)


@every_model
def test_intermediates_refuse_what_does_not_exist(model, x):
    for indices in ([99], 99, []):
        with pytest.raises(ValueError, match="do not name"):
            model.forward_intermediates(x, indices)
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NCHW")


@pytest.mark.parametrize("prune_norm", [False, True])
@every_model
def test_pruning_keeps_the_outputs_of_what_stays(model, x, prune_norm):
    before = model.forward_intermediates(x, [1], intermediates_only=True)[0]
    model.reset_classifier(3)
    assert model.prune_intermediate_layers([1], prune_norm=prune_norm) == [1]
    assert torch.equal(model.forward_intermediates(x, [1], intermediates_only=True)[0], before)
    assert len(model.feature_info) == 2
    assert model(x).shape == (2, model.num_features)
    # Nothing that may come later needs what was dropped.
    model.reset_classifier(3, model.global_pool)
    model.set_input_size(model.img_size)
    assert model(x).shape == (2, 3)


@every_model
def test_checkpointed_blocks_give_the_same_gradients(model, x):
    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.set_grad_checkpointing()
    checkpointed = gradients()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
        assert gradient.any(), name


@every_model
def test_another_input_size(model):
    larger = tuple(2 * side if axis == 0 else side for axis, side in enumerate(model.img_size))
    model.set_input_size(larger)
    assert model.img_size == larger
    assert model.grid_size == tuple(s // p for s, p in zip(larger, model.patch_size, strict=True))
    assert model(torch.rand(1, model.in_chans, *larger)).shape == (1, model.num_features)
    with pytest.raises(ValueError, match="not a multiple"):
        model.set_input_size((larger[0] + 1, *larger[1:]))
    side = 2 * math.lcm(*model.patch_size)
    model.set_input_size(side, model.patch_size)
    assert model.img_size == (side,) * 3
    assert model(torch.rand(1, model.in_chans, *model.img_size)).shape == (1, model.num_features)
    for wrong in ("96", (64, 64), 96.0, 0):
        with pytest.raises(ValueError, match=r"img_size is .*; give three whole numbers"):
            model.set_input_size(wrong)
    assert model.img_size == (side,) * 3


@every_model
def test_what_is_frozen_stays_frozen_at_another_size(model):
    model.requires_grad_(False)
    kept = dict(model.named_parameters())
    model.set_input_size(model.img_size)
    assert all(parameter is kept[name] for name, parameter in model.named_parameters())
    patch_size = tuple(side // 2 for side in model.patch_size) if hasattr(model, "patch_embed") else None
    model.set_input_size(2 * math.lcm(*model.patch_size), patch_size)
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@every_model
def test_wrong_input_is_refused_in_one_sentence(model, x):
    for call in (model, model.forward_intermediates):
        with pytest.raises(ValueError, match="set_input_size"):
            call(x[:, :, 1:])
        with pytest.raises(ValueError, match=r"takes batches \(B, C, D, H, W\); x\[None\]"):
            call(x[0])


@every_model
def test_bf16_autocast_stays_close(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x).float()
    high = model(x)
    assert (low - high).norm() < 0.1 * high.norm()


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(model, x, dtype):
    high = model(x)
    low = model.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    assert (low.float() - high).norm() < 0.1 * high.norm()


@one_of_each_family
def test_compile_and_export(model, x):
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(batch,)).module()
    torch.testing.assert_close(exported(x[:1]), expected[:1])


@every_model
def test_layer_decay_covers_all_parameters_once_and_leaves_vectors_alone(model):
    model.reset_classifier(2)
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert all(scale[id(p)] == 1.0 for name, p in named.items() if name.startswith(("head.", "attn_pool.")))
    assert min(scale.values()) < 0.5
    assert not any(decay[id(p)] for name, p in named.items() if name in model.no_weight_decay() or p.ndim == 1)


# --- token encoders ---------------------------------------------------------------------------------------------------


@every_token_model
def test_visible_tokens_are_those_of_the_kept_patches(model, x):
    everything = torch.arange(math.prod(model.grid_size)).expand(2, -1)
    assert torch.equal(model.forward_visible(x, everything), model.forward_features(x))
    keep = torch.tensor([[0, 3, 7], [1, 2, 11]])
    x = x.requires_grad_()
    tokens = model.forward_visible(x, keep)
    assert tokens.shape == (2, model.num_prefix_tokens + 3, model.num_features)
    tokens.square().sum().backward()
    assert _patches_with_gradient(model, x) == [[b, i] for b in range(2) for i in keep[b].tolist()]


@cases(medmim.list_models(), having=lambda model: hasattr(model, "forward_replaced"))
def test_replaced_patches_are_never_used(model, x):
    hidden = torch.zeros(2, *model.grid_size, dtype=torch.bool)
    token = torch.zeros(1, 1, model.embed_dim)
    torch.testing.assert_close(model.forward_replaced(x, hidden, token), model.forward_features(x))
    hidden.view(2, -1)[:, ::2] = True
    x = x.requires_grad_()
    features = model.forward_replaced(x, hidden, token)
    assert features.shape == model.forward_features(x).shape
    features.square().sum().backward()
    assert _patches_with_gradient(model, x) == (~hidden).flatten(1).nonzero().tolist()


def _patches_with_gradient(model: nn.Module, x: torch.Tensor) -> list[list[int]]:
    seen = nn.functional.max_pool3d((x.grad != 0).float(), model.patch_size, model.patch_size)
    return seen.amax(dim=1).flatten(1).nonzero().tolist()


@cases(["vit_t_mae3d"])
def test_visible_tokens_compile(model, x):
    keep = torch.tensor([[0, 3, 7], [1, 2, 11]])
    torch._dynamo.reset()
    compiled = torch.compile(model.forward_visible, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, keep), model.forward_visible(x, keep))


@every_token_model
def test_another_patch_size(model):
    size = tuple(side // 2 if axis == 2 else side for axis, side in enumerate(model.patch_size))
    model.set_input_size(patch_size=size)
    assert model.grid_size[2] == model.img_size[2] // size[2]
    assert model(torch.rand(1, model.in_chans, *model.img_size)).shape == (1, model.num_features)


def test_fixed_positions_stay_where_they_are_in_the_input():
    model = tiny_model()
    before = model.pos_embed.view(*model.grid_size, -1)
    img_size, patch_size = model.img_size, model.patch_size
    model.set_input_size(tuple(side + 2 * patch for side, patch in zip(img_size, patch_size, strict=True)))
    inner = model.pos_embed.view(*model.grid_size, -1)[1:-1, 1:-1, 1:-1]
    torch.testing.assert_close(inner, before)
    model.set_input_size(img_size)
    assert torch.equal(model.pos_embed.view_as(before), before)
    model.set_input_size(model.img_size, tuple(patch // 2 for patch in patch_size))
    assert torch.equal(model.pos_embed, sincos_position(model.grid_size, model.embed_dim))


def test_attention_pools_whatever_the_order_and_leaves_the_prefix_out():
    model = tiny_model(global_pool="attn", class_token=True, num_registers=1).eval()
    tokens = torch.rand(2, 2 + math.prod(model.grid_size), model.num_features)
    pooled = model.forward_head(tokens, pre_logits=True)
    shuffled = torch.cat([torch.zeros(2, 2, model.num_features), tokens[:, 2:].flip(1)], dim=1)
    torch.testing.assert_close(model.forward_head(shuffled, pre_logits=True), pooled)
    assert (model.forward_head(tokens.clone(), pre_logits=True) - tokens[:, 2:].mean(dim=1)).abs().max() > 0.1
    model.reset_classifier(3)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), pooled)
    model.reset_classifier(3, "attn")
    assert not torch.allclose(model.forward_head(tokens, pre_logits=True), pooled)
    model.reset_classifier(3, "avg")
    assert not any(name.startswith("attn_pool") for name in model.state_dict())


def test_constructor_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="class_token"):
        VisionTransformer3D((16, 48, 32), (8, 16, 16), embed_dim=48, depth=1, num_heads=4, global_pool="token")
    with pytest.raises(ValueError, match="sincos"):
        VisionTransformer3D((16, 48, 32), (8, 16, 16), embed_dim=48, depth=1, num_heads=4, pos_embed="rope")
    with pytest.raises(ValueError, match="heads"):
        VisionTransformer3D((16, 48, 32), (8, 16, 16), embed_dim=48, depth=1, num_heads=5)


# --- fitting weights to other shapes ----------------------------------------------------------------------------------


def test_resized_kernel_gives_the_same_token_for_a_resized_patch():
    """FlexiViT's promise, exact when the patch grows: upsampling loses nothing."""
    patch = torch.rand(1, 1, 4, 8, 2)
    kernel = torch.randn(5, 1, 4, 8, 2)
    larger = torch.nn.functional.interpolate(patch, size=(8, 8, 6), mode="trilinear", align_corners=False)
    resized = resize_patch_kernel(kernel, (8, 8, 6))
    old = (kernel * patch).sum(dim=(1, 2, 3, 4))
    torch.testing.assert_close((resized * larger).sum(dim=(1, 2, 3, 4)), old, rtol=1e-4, atol=1e-4)
    assert torch.equal(resize_patch_kernel(kernel, (4, 8, 2)), kernel)


@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 1), (2, 4), (4, 3)])
def test_other_channels_keep_the_tokens_of_a_repeated_input(old, new):
    kernel = torch.randn(5, 1, 2, 2, 2).expand(-1, old, -1, -1, -1)
    image = torch.rand(1, 1, 2, 2, 2)
    before = (kernel * image).sum(dim=(1, 2, 3, 4))
    after = (adapt_in_chans(kernel, new) * image).sum(dim=(1, 2, 3, 4))
    torch.testing.assert_close(after, before)


def test_learned_positions_follow_an_anisotropic_grid():
    source = {"img_size": (16, 16, 32), "patch_size": (8, 8, 8)}
    saved = VisionTransformer3D(**source, embed_dim=12, depth=1, num_heads=2, pos_embed="learned")
    model = VisionTransformer3D((32, 16, 16), (8, 8, 8), embed_dim=12, depth=1, num_heads=2, pos_embed="learned")
    adapted = adapt_state_dict(saved.state_dict(), model, source)
    model.load_state_dict(adapted, strict=True)
    position = model.pos_embed.view(4, 2, 2, 12)
    expected = saved.pos_embed.view(2, 2, 4, 12).unfold(2, 2, 2).mean(dim=-1)  # along W, 4 -> 2 is a mean of pairs
    torch.testing.assert_close(position[0], expected[0])
    torch.testing.assert_close(position[3], expected[1])
