"""Swin weights from MONAI and back: the same numbers from every stage, and nothing dropped in silence."""

from __future__ import annotations

import pytest
import torch
from monai import __version__ as monai_version
from monai.networks.nets.swin_unetr import PatchMergingV2, SwinTransformer, SwinUNETR
from torch import nn

import medmim
from medmim.convert.monai_swin import from_swin_transformer, to_swin_transformer
from medmim.errors import WeightsError
from medmim.models.swin import SwinTransformer3D

# Four stages, as MONAI has it; the first two have a shifted block.
TINY = {"embed_dim": 12, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 3, 4)}
MONAI_REPEATS = tuple(map(int, monai_version.split(".")[:2])) < (1, 5)


class RepeatedMerging(PatchMergingV2):
    """Merging as MONAI had it before 1.5, for even sides: of eight tokens two are taken twice and two are not."""

    def forward(self, x):
        along_d, along_h, along_w = x[:, 1::2, ::2, ::2], x[:, ::2, 1::2, ::2], x[:, ::2, ::2, 1::2]
        first, last = x[:, ::2, ::2, ::2], x[:, 1::2, 1::2, 1::2]
        taken = [first, along_d, along_h, along_w, x[:, 1::2, ::2, 1::2], along_h, along_w, last]
        return self.reduction(self.norm(torch.cat(taken, dim=-1)))


def randomise(module: nn.Module) -> nn.Module:
    """Moves every parameter from where it starts, position biases far enough for attention to depend on them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        scale = 1.0 if name.endswith("table") else 0.1
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def reference(*, patch_size=(2, 2, 2), window_size=(7, 7, 7), in_chans=1, merged="distinct") -> SwinTransformer:
    if merged == "distinct" and MONAI_REPEATS:
        pytest.skip("this MONAI merges patches in the old way")
    merging = RepeatedMerging if merged == "repeated" else "merging"
    args = {"window_size": window_size, "patch_size": patch_size, **TINY}
    return randomise(SwinTransformer(in_chans, **args, downsample=merging))


CASES = {
    "grids that windows divide": {"img_size": (24, 48, 12), "window_size": (3, 3, 3)},
    "one window": {"img_size": (8, 10, 14), "window_size": (7, 7, 7)},
    "a window along some axes": {"img_size": (6, 10, 44), "window_size": (7, 5, 7)},
    "padded grids, odd mergings": {"img_size": (18, 34, 26), "window_size": (3, 4, 5)},
    "anisotropic patches, channels": {"img_size": (16, 48, 12), "window_size": (2, 4, 3), "patch_size": (4, 3, 1)}
    | {"in_chans": 2},
    "merging before 1.5": {"img_size": (32, 64, 32), "window_size": (4, 3, 5), "merged": "repeated"},
}


@pytest.mark.parametrize("args", CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_every_stage_gives_what_monai_gives(args):
    theirs = reference(**{key: value for key, value in args.items() if key != "img_size"})
    ours = SwinTransformer3D(**args, **TINY).eval()
    ours.load_state_dict(from_swin_transformer(theirs.state_dict(), window_size=args["window_size"]))
    x = torch.rand(2, ours.in_chans, *args["img_size"], generator=torch.Generator().manual_seed(1))
    for norm in (False, True):
        maps = ours.forward_intermediates(x, norm=norm, intermediates_only=True)
        assert len(maps) == len(theirs(x)) == 5
        for a, b in zip(maps, theirs(x, normalize=norm), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            assert a.std() > 0.1  # a map of zeros would agree with anything
    torch.testing.assert_close(ours.forward_features(x), theirs(x)[-1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gradients_are_those_of_monai():
    theirs = reference(window_size=(3, 4, 3))
    ours = SwinTransformer3D((16, 24, 32), window_size=(3, 4, 3), **TINY).eval()
    ours.load_state_dict(from_swin_transformer(theirs.state_dict(), window_size=(3, 4, 3)))
    x = torch.rand(1, 1, 16, 24, 32, generator=torch.Generator().manual_seed(1))
    target = torch.rand(1, 192, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    with torch.enable_grad():
        for features in (ours.forward_features(x), theirs(x)[-1]):
            (features * target).sum().backward()
    gradients = from_swin_transformer({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)
        assert parameter.grad.any(), name


@torch.no_grad()
def test_weights_go_to_monai_and_back():
    ours = randomise(SwinTransformer3D((16, 32, 16), window_size=(3, 4, 2), **TINY))
    state = ours.state_dict()
    theirs = reference(window_size=(3, 4, 2))
    theirs.load_state_dict(to_swin_transformer(state, window_size=(3, 4, 2)))
    x = torch.rand(1, 1, 16, 32, 16)
    torch.testing.assert_close(theirs(x)[-1], ours.forward_features(x), rtol=1e-5, atol=1e-5)
    back = from_swin_transformer(theirs.state_dict(), window_size=(3, 4, 2))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_swin_unetr_gives_its_encoder_and_takes_it_back():
    unetr = randomise(
        SwinUNETR(in_channels=1, out_channels=2, feature_size=12, depths=(2, 2, 1, 1), num_heads=(3,) * 4)
    )
    encoder = unetr.swinViT.state_dict()
    state = from_swin_transformer(unetr.state_dict())
    assert all(torch.equal(tensor, from_swin_transformer(encoder)[key]) for key, tensor in state.items())
    SwinTransformer3D((32, 32, 64), **{**TINY, "num_heads": (3,) * 4}).load_state_dict(state)
    back = to_swin_transformer(state)
    assert back.keys() == encoder.keys()
    assert all(torch.equal(back[key], encoder[key]) for key in encoder)


def test_names_of_the_published_self_supervised_weights_are_known():
    encoder = reference().state_dict()
    published = {f"module.{key}".replace("mlp.linear", "mlp.fc"): tensor for key, tensor in encoder.items()}
    state = from_swin_transformer(encoder)
    assert from_swin_transformer(published).keys() == state.keys()
    with pytest.raises(WeightsError, match="under another name too"):
        from_swin_transformer({**encoder, **published})


@pytest.mark.parametrize("name", medmim.list_models("swin_*"))
def test_models_of_the_catalog_are_monai_models(name):
    args = medmim.model_info(name).args
    model = medmim.create_model(name, img_size=(32, 32, 32), device="meta")
    theirs = SwinTransformer(**{key: value for key, value in args.items() if key != "img_size"}).state_dict()
    converted = to_swin_transformer(model.state_dict())
    assert {key: tensor.shape for key, tensor in converted.items()} == {key: t.shape for key, t in theirs.items()}


@pytest.mark.parametrize(
    "key",
    [
        "layers1c.0.layer.conv1.conv.weight",
        "patch_embed.norm.weight",
        "layers1.0.blocks.0.attn.extra",
        "layers1.1.blocks.0.norm1.weight",
        "layers5.0.blocks.0.norm1.weight",
        "module.swinViT.patch_embed.proj.bias",
        "encoder",
    ],
)
def test_nothing_is_dropped_in_silence(key):
    with pytest.raises(WeightsError, match=key):
        from_swin_transformer({key: torch.zeros(1)})
    with pytest.raises(WeightsError, match=key):
        to_swin_transformer({key: torch.zeros(1)})


def test_what_monai_has_no_place_for_is_refused():
    small = {"img_size": (16, 16, 16), "embed_dim": 3, "window_size": (2, 2, 2)}
    with pytest.raises(WeightsError, match="reset_classifier"):
        to_swin_transformer(SwinTransformer3D(**small, num_heads=(1,) * 4, num_classes=2).state_dict())
    with pytest.raises(WeightsError, match="four stages"):
        to_swin_transformer(SwinTransformer3D(**small, depths=(1,) * 5, num_heads=(1,) * 5).state_dict())


def test_indices_of_another_window_are_refused():
    with pytest.raises(WeightsError, match=r"relative_position_index.*window_size"):
        from_swin_transformer(reference(window_size=(3, 4, 3)).state_dict(), window_size=(4, 3, 3))
