"""SimMIM on a non-cubic volume with anisotropic patches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.networks.utils import pixelshuffle

from fakes import tiny_model
from medmim.layers.tokens import hidden_voxels, to_grid_size
from medmim.models.vit import VisionTransformer3D
from medmim_training.methods.simmim import SimMIM

SIZE, PATCH = (32, 48, 64), (8, 16, 32)


def build(**args) -> SimMIM:
    torch.manual_seed(0)
    return SimMIM(VisionTransformer3D(SIZE, PATCH, embed_dim=48, depth=2, num_heads=4, class_token=True), **args)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 1, 1, *SIZE, generator=torch.Generator().manual_seed(1))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def hidden_of_step(method: SimMIM, x: torch.Tensor) -> torch.Tensor:
    unit = method.decoder.unit
    _, idx_hidden = method.hiding(x[:, 0], unit, generator=seeded())
    return hidden_voxels(idx_hidden, unit, to_grid_size(method.encoder.img_size, unit))


UNITS = pytest.mark.parametrize("unit", [None, (16, 16, 64)], ids=["patch", "larger"])


@UNITS
def test_the_encoder_never_sees_a_hidden_voxel(x, unit):
    method = build(unit=unit)
    hidden = hidden_of_step(method, x)
    x = x[:, 0].requires_grad_()
    idx = method.hiding(x, method.decoder.unit, generator=seeded())
    method.decoder.predict(method.encoder, x, *idx).square().sum().backward()
    assert torch.equal(x.grad != 0, ~hidden)


@UNITS
def test_the_loss_sees_exactly_the_hidden_voxels(x, unit):
    method = build(unit=unit)
    method.decoder.to_voxels.weight.data.zero_()
    method({"x": x.requires_grad_()}, seeded()).loss.backward()
    assert torch.equal(x.grad[:, 0] != 0, hidden_of_step(method, x))


def test_each_token_predicts_the_voxels_of_its_own_patch(x):
    """With a bias that depends on the place alone, the prediction of every hidden patch is that bias."""
    method = build()
    method.decoder.to_voxels.weight.data.zero_()
    method.decoder.to_voxels.bias.data.copy_(torch.arange(8 * 16 * 32).float())
    picture = method({"x": x}, seeded()).picture()
    pattern = torch.arange(8 * 16 * 32).float().view(PATCH).repeat(4, 3, 2)
    assert torch.equal(picture.prediction[0][picture.hidden], pattern[picture.hidden])


def test_every_parameter_learns(x):
    method = build()
    method({"x": x}, seeded()).loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_swin_transformer_never_sees_a_hidden_voxel_and_learns():
    """Its patches are smaller than what is hidden, and its last tokens stand for more than one of these."""
    torch.manual_seed(0)
    encoder = tiny_model("swin_t_simmim3d")
    method = SimMIM(encoder, unit=[2 * side for side in encoder.patch_size])
    x = torch.rand(2, 1, 1, *encoder.img_size, generator=seeded())
    hidden = hidden_of_step(method, x)
    other = torch.where(hidden[:, None], torch.rand(x.shape), x)
    first, second = (method({"x": each}, seeded()) for each in (x, other))
    predicted, again = first.picture().prediction, second.picture().prediction
    assert torch.equal(predicted[:, hidden[0, 0]], again[:, hidden[0, 0]])
    first.loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_on_a_swin_transformer_the_layer_is_the_shuffle_head_of_simmim():
    encoder = tiny_model("swin_t_simmim3d", patch_size=(2, 2, 2), in_chans=2)
    method = SimMIM(encoder, unit=(8, 8, 8))
    features = torch.randn(2, encoder.num_features, *(side // 8 for side in encoder.img_size), generator=seeded())
    weight, bias = method.decoder.to_voxels.weight, method.decoder.to_voxels.bias
    expected = pixelshuffle(F.conv3d(features, weight[..., None, None, None], bias), 3, 8)
    torch.testing.assert_close(method.decoder(features, encoder.img_size), expected)


def test_a_unit_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        build(unit=(12, 16, 32))
