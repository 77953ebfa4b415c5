"""What a masked autoencoder must get right, on a non-cubic volume with anisotropic patches."""

from __future__ import annotations

import math

import pytest
import torch
from monai.networks.nets import MaskedAutoEncoderViT

from medmim.errors import SpecError
from medmim.layers.tokens import gather_patches, hidden_voxels, patchify, random_hiding, scatter_tokens, unpatchify
from medmim.models.vit import VisionTransformer3D
from medmim_training.methods import create_method
from medmim_training.methods.mae import MAE

SIZE, PATCH, GRID = (32, 48, 64), (8, 16, 32), (4, 3, 2)
TOKENS = math.prod(GRID)


def build(*, class_token: bool = False, **args) -> MAE:
    torch.manual_seed(0)
    encoder = VisionTransformer3D(SIZE, PATCH, embed_dim=48, depth=2, num_heads=4, class_token=class_token)
    return MAE(encoder, decoder={"embed_dim": 24, "depth": 1, "num_heads": 2}, **args)


def batch(requires_grad: bool = False) -> dict[str, torch.Tensor]:
    x = torch.rand(2, 1, 1, *SIZE, generator=torch.Generator().manual_seed(1))
    return {"x": x.requires_grad_(requires_grad)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden_of_step(seed: int = 0) -> torch.Tensor:
    """The voxels (B, 1, D, H, W) that a step with this seed hides."""
    _, idx_hidden = random_hiding(2, TOKENS, 0.75, generator=seeded(seed))
    return hidden_voxels(idx_hidden, PATCH, GRID)


def test_the_encoder_never_sees_a_hidden_voxel():
    method, data = build(), batch(requires_grad=True)
    idx_keep, _ = random_hiding(2, TOKENS, 0.75, generator=seeded())
    method.encoder.forward_visible(data["x"][:, 0], idx_keep).square().sum().backward()
    gradient = data["x"].grad
    assert torch.equal(gradient[:, 0] != 0, ~hidden_of_step())


@pytest.mark.parametrize("target", ["voxels", "normalised"])
@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_the_loss_sees_exactly_the_hidden_voxels(target, loss):
    """With the prediction held fixed, the loss depends on hidden voxels and on no others."""
    method, data = build(target=target, loss=loss), batch(requires_grad=True)
    method.decoder.to_voxels.weight.data.zero_()  # the prediction no longer depends on the input,
    method.decoder.to_voxels.bias.data.normal_()  # and is not the mean of a normalised patch, where the loss is flat
    method(data, seeded()).loss.backward()
    assert torch.equal(data["x"].grad[:, 0] != 0, hidden_of_step())


def test_changing_hidden_voxels_does_not_change_the_prediction():
    method, data = build(), batch()
    hidden = hidden_of_step()
    other = {"x": torch.where(hidden[:, None], torch.rand(data["x"].shape, generator=seeded(5)), data["x"])}
    first, second = (method(each, seeded()).picture().prediction for each in (data, other))
    assert torch.equal(first[:, hidden[0, 0]], second[:, hidden[0, 0]])


def test_the_loss_is_the_mean_over_hidden_voxels():
    method, data = build(loss="mse"), batch()
    output = method(data, seeded())
    assert torch.equal(output.picture().hidden, hidden_of_step()[0, 0])
    single = {"x": data["x"][:1]}
    torch.manual_seed(0)
    picture = method(single, seeded()).picture()
    error = (picture.prediction - single["x"][0, 0])[:, picture.hidden]
    torch.testing.assert_close(method(single, seeded()).loss, error.square().mean())


def test_what_lies_outside_of_a_scan_is_not_asked_for():
    """The first sample's scan ends inside of patches; the second fills its crop. Both weigh the same."""
    method, data = build(loss="mse"), batch()
    data["inside"] = torch.tensor([[[[4, 30], [0, 48], [10, 50]]], [[[0, 32], [0, 48], [0, 64]]]])
    inside = torch.zeros(2, *SIZE, dtype=torch.bool)
    inside[0, 4:30, :, 10:50] = inside[1] = True
    counted = hidden_of_step()[:, 0] & inside
    idx_keep, idx_hidden = random_hiding(2, TOKENS, 0.75, generator=seeded())
    predicted = method.decoder(method.encoder.forward_visible(data["x"][:, 0], idx_keep), idx_keep, idx_hidden)
    patches = scatter_tokens(torch.zeros(2, TOKENS, math.prod(PATCH)), idx_hidden, predicted)
    error = (unpatchify(patches, PATCH, GRID) - data["x"][:, 0])[:, 0].square()
    expected = [sample[where].mean() for sample, where in zip(error, counted, strict=True)]
    torch.testing.assert_close(method(data, seeded()).loss, sum(expected) / 2)


def test_the_picture_shows_the_scan_where_it_was_visible():
    picture = build()(batch(), seeded()).picture()
    assert torch.equal(picture.prediction[:, ~picture.hidden], picture.original[:, ~picture.hidden])
    assert picture.hidden.float().mean() == 0.75


def test_every_parameter_learns():
    method = build(class_token=True)
    method(batch(), seeded()).loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_encoder_gives_the_same_features_afterwards():
    """`forward_features` on all tokens is what `forward_visible` computed in pretraining, bit for bit."""
    encoder = build().encoder.eval()
    x, everything = batch()["x"][:, 0], torch.arange(TOKENS).expand(2, -1)
    assert torch.equal(encoder.forward_visible(x, everything), encoder.forward_features(x))


def test_what_predicts_no_voxels_is_drawn_as_voxels_and_not_published():
    """Of a perfect prediction of normalised patches, the picture is the scan."""
    method, data = build(target="normalised"), batch()
    method.decoder.predict = lambda encoder, x, idx_keep, idx_hidden: method.target.of(
        gather_patches(x, idx_hidden, PATCH)
    )
    output = method(data, seeded())
    assert output.loss == 0
    torch.testing.assert_close(output.picture().prediction, data["x"][0, 0])
    assert method.decoder_spec is None
    assert build().decoder_spec.kind == "mae"


def test_normalised_targets_survive_air():
    method = build(target="normalised", loss="mse")
    assert method({"x": torch.zeros(1, 1, 1, *SIZE)}, seeded()).loss.isfinite()


@pytest.mark.parametrize("args", [{"target": "voxel"}, {"loss": "l3"}, {"ratioo": 0.5}])
def test_wrong_arguments_are_named(args):
    encoder = build().encoder
    with pytest.raises(SpecError, match=str(next(iter(args)))):
        create_method("mae", encoder, args)


def test_output_equals_monai():
    """Weights copied across, MONAI's masked autoencoder predicts the same voxels."""
    torch.manual_seed(0)
    size, patch, grid, heads = (32, 32, 64), (8, 16, 32), (4, 2, 2), 4
    theirs = MaskedAutoEncoderViT(
        1, size, patch, 48, 192, 2, heads, decoder_hidden_size=24, decoder_mlp_dim=96, decoder_num_layers=2,
        decoder_num_heads=2, proj_type="conv", pos_embed_type="learnable", decoder_pos_embed_type="learnable",
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    encoder = VisionTransformer3D(
        size, patch, embed_dim=48, depth=2, num_heads=heads, qkv_bias=False, class_token=True, pos_embed="learned"
    )
    method = MAE(encoder, decoder={"embed_dim": 24, "depth": 2, "num_heads": 2}).eval()
    for module in method.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    theirs_state = theirs.state_dict()
    renames = [
        ("patch_embedding.position_embeddings", "encoder.pos_embed"),
        ("patch_embedding.patch_embeddings.", "encoder.patch_embed.proj."),
        ("cls_token", "encoder.cls_token"),
        ("decoder_blocks.2.", "decoder.norm."),
        ("decoder_blocks.", "decoder.blocks."),
        ("blocks.2.", "encoder.norm."),
        ("blocks.", "encoder.blocks."),
        ("decoder_embed.", "decoder.embed."),
        ("decoder_pos_embedding", "decoder.pos_embed"),
        ("decoder_pred.", "decoder.to_voxels."),
        ("mask_tokens", "decoder.hidden_token"),
    ]
    state = {}
    for key, value in theirs_state.items():
        if "cross_attn" in key:
            continue  # left over in MONAI's block, never used
        prefix, ours = next((a, b) for a, b in renames if key.startswith(a))
        name = ours + key.removeprefix(prefix)
        name = name.replace("out_proj", "proj").replace("linear1", "fc1").replace("linear2", "fc2")
        state[name] = value
    for i in range(2):  # MONAI's projections have no bias
        state[f"decoder.blocks.{i}.attn.qkv.bias"] = torch.zeros(72)
    method.decoder.pos_embed.copy_(state.pop("decoder.pos_embed"))
    method.load_state_dict(state, strict=True)

    x = torch.rand(2, 1, *size)
    torch.manual_seed(3)
    with torch.no_grad():
        predicted, visible_is_zero = theirs(x)  # (B, N, V); their second output is 1 where hidden
        idx_hidden = visible_is_zero.nonzero()[:, 1].view(2, -1)
        idx_keep = (1 - visible_is_zero).nonzero()[:, 1].view(2, -1)
        ours = method.decoder(method.encoder.forward_visible(x, idx_keep), idx_keep, idx_hidden)
    expected = predicted.gather(1, idx_hidden[..., None].expand_as(ours))
    scale = expected.std()
    torch.testing.assert_close(ours / scale, expected / scale, rtol=0, atol=1e-5)
    assert unpatchify(patchify(x, patch), patch, grid).equal(x)
    assert gather_patches(x, idx_hidden, patch).shape == ours.shape
