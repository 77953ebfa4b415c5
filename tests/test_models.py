"""The contract every encoder of the catalog keeps, at a tiny size, non-cubic, with anisotropic patches.

A new architecture gets these tests by being in the catalog.
"""

from __future__ import annotations

import math

import pytest
import torch
from timm.optim import param_groups_layer_decay

import medmim
from medmim.models.vit import VisionTransformer3D, adapt_in_chans, adapt_state_dict, resize_patch_kernel

SIZE, PATCH, GRID = (16, 48, 32), (8, 16, 16), (2, 3, 2)
TINY = {"vit": {"embed_dim": 48, "depth": 3, "num_heads": 4, "img_size": SIZE, "patch_size": PATCH}}
VARIANTS = [
    {},
    {"class_token": True, "num_registers": 2, "global_pool": "token"},
    {"pos_embed": "learned", "init_values": 0.1, "in_chans": 2},
]


def tiny(name: str, **args):
    torch.manual_seed(0)
    return medmim.create_model(name, **{**TINY[medmim.model_info(name).family], **args})


# One model a family, for tests of what does not depend on the numbers in the catalog.
FAMILIES = list({medmim.model_info(name).family: name for name in reversed(medmim.list_models())}.values())


@pytest.fixture(params=range(len(VARIANTS)), ids=["plain", "tokens", "learned"])
def variant(request) -> dict:
    return VARIANTS[request.param]


@pytest.fixture(params=medmim.list_models())
def name(request) -> str:
    return request.param


@pytest.fixture
def model(name, variant):
    return tiny(name, **variant).eval()


@pytest.fixture
def x(model) -> torch.Tensor:
    return torch.rand(2, model.in_chans, *SIZE, generator=torch.Generator().manual_seed(0))


def test_forward_is_the_head_of_the_features(model, x):
    tokens = model.forward_features(x)
    assert tokens.shape == (2, model.num_prefix_tokens + math.prod(GRID), model.num_features)
    assert torch.equal(model(x), model.forward_head(tokens))
    assert model(x).shape == (2, model.num_features)


def test_classifier_can_be_replaced(model, x):
    features = model(x)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), features)
    assert model.get_classifier().out_features == model.num_classes == 5
    model.reset_classifier(0)
    assert torch.equal(model(x), features)


def test_intermediates_are_what_the_blocks_give(model, x):
    final, every = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, model.forward_features(x))
    assert len(every) == len(model.feature_info) == 3
    for feature, info in zip(every, model.feature_info, strict=True):
        stride = info["reduction"]
        assert feature.shape == (2, info["num_chs"], *(side // s for side, s in zip(SIZE, stride, strict=True)))
    tokens = model.forward_intermediates(x, [-1], norm=True, output_fmt="NLC", intermediates_only=True)[0]
    assert torch.equal(tokens, final[:, model.num_prefix_tokens :])
    assert torch.equal(every[-1].flatten(2).transpose(1, 2), tokens)
    ((patches, prefix),) = model.forward_intermediates(x, 1, return_prefix_tokens=True, intermediates_only=True)
    assert prefix.shape == (2, model.num_prefix_tokens, 48)
    assert patches.shape == (2, 48, *GRID)
    early = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    late = model.forward_intermediates(x, [0], intermediates_only=True)
    assert torch.equal(early[0], late[0])


def test_intermediates_refuse_what_does_not_exist(model, x):
    with pytest.raises(ValueError, match="do not name blocks"):
        model.forward_intermediates(x, [7])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NCHW")


def test_pruning_keeps_the_outputs_of_the_blocks_that_stay(model, x):
    before = model.forward_intermediates(x, [1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.blocks) == 2
    assert torch.equal(model.forward_intermediates(x, [1], intermediates_only=True)[0], before)


def test_visible_tokens_are_those_of_the_kept_patches(model, x):
    everything = torch.arange(math.prod(GRID)).expand(2, -1)
    assert torch.equal(model.forward_visible(x, everything), model.forward_features(x))
    keep = torch.tensor([[0, 3, 7], [1, 2, 11]])
    x = x.requires_grad_()
    tokens = model.forward_visible(x, keep)
    assert tokens.shape == (2, model.num_prefix_tokens + 3, model.num_features)
    tokens.square().sum().backward()
    seen = torch.nn.functional.max_pool3d((x.grad != 0).float(), PATCH, PATCH).amax(dim=1).flatten(1).nonzero()
    assert seen.tolist() == [[b, i] for b in range(2) for i in keep[b].tolist()]


def test_checkpointed_blocks_give_the_same_gradients(model, x):
    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.set_grad_checkpointing()
    checkpointed = gradients()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert all(gradient.any() for gradient in plain.values())


def test_another_input_size_and_patch_size(model):
    model.set_input_size((32, 32, 48))
    assert model.grid_size == (4, 2, 3)
    assert model(torch.rand(1, model.in_chans, 32, 32, 48)).shape == (1, 48)
    model.set_input_size(patch_size=(16, 8, 16))
    assert model.grid_size == (2, 4, 3)
    assert model(torch.rand(1, model.in_chans, 32, 32, 48)).shape == (1, 48)
    with pytest.raises(ValueError, match="not a multiple"):
        model.set_input_size((32, 32, 50))


def test_wrong_input_is_refused_in_one_sentence(model):
    with pytest.raises(ValueError, match="set_input_size"):
        model(torch.rand(1, model.in_chans, 16, 16, 16))


def test_bf16_autocast_stays_close(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x).float()
    torch.testing.assert_close(low, model(x), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_compile_and_export(model, x):
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    keep = torch.tensor([[0, 3, 7], [1, 2, 11]])
    torch.testing.assert_close(
        torch.compile(model.forward_visible, fullgraph=True, backend="eager")(x, keep), model.forward_visible(x, keep)
    )
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(model, (x,), dynamic_shapes=({**batch},)).module()
    torch.testing.assert_close(exported(x[:1]), expected[:1])


def test_layer_decay_sorts_parameters_by_depth(model):
    model.reset_classifier(2)
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    depth = [scale[id(named[f"blocks.{i}.attn.qkv.weight"])] for i in range(3)]
    assert depth == sorted(depth)
    assert scale[id(named["patch_embed.proj.weight"])] < depth[0]
    assert scale[id(named["head.weight"])] == 1.0
    assert not any(decay[id(p)] for name, p in named.items() if name in model.no_weight_decay() or p.ndim == 1)


def test_constructor_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="class_token"):
        VisionTransformer3D(SIZE, PATCH, embed_dim=48, depth=1, num_heads=4, global_pool="token")
    with pytest.raises(ValueError, match="sincos"):
        VisionTransformer3D(SIZE, PATCH, embed_dim=48, depth=1, num_heads=4, pos_embed="rope")
    with pytest.raises(ValueError, match="heads"):
        VisionTransformer3D(SIZE, PATCH, embed_dim=48, depth=1, num_heads=5)


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
