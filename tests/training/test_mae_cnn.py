"""MAE on a convolutional pyramid, on a non-cubic volume."""

from __future__ import annotations

import pytest
import torch

from medmim.layers.tokens import hidden_voxels, to_grid_size
from medmim.models.resenc import ResidualEncoder3D
from medmim_training.methods.mae_cnn import MAECNN

SIZE, UNIT = (16, 32, 24), (8, 16, 12)


def build(**args) -> MAECNN:
    torch.manual_seed(0)
    encoder = ResidualEncoder3D(SIZE, strides=[1, 2, [1, 2, 2]], channels=[4, 6, 8], depths=[1, 1, 1])
    return MAECNN(encoder, unit=UNIT, **args)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 1, 1, *SIZE, generator=torch.Generator().manual_seed(1))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def hidden_of_step(method: MAECNN, x: torch.Tensor) -> torch.Tensor:
    _, idx_hidden = method.hiding(x[:, 0], UNIT, generator=seeded())
    return hidden_voxels(idx_hidden, UNIT, to_grid_size(SIZE, UNIT))


def test_changing_hidden_voxels_does_not_change_the_prediction(x):
    method = build(ratio=0.5)
    hidden = hidden_of_step(method, x)
    other = torch.where(hidden[:, None], torch.rand(x.shape), x)
    first, second = (method({"x": each}, seeded()).picture() for each in (x, other))
    assert torch.equal(first.prediction[:, hidden[0, 0]], second.prediction[:, hidden[0, 0]])
    assert torch.equal(first.hidden, hidden[0, 0])


def test_the_loss_sees_exactly_the_hidden_voxels(x):
    method = build()
    method.decoder.to_voxels.weight.data.zero_()
    method({"x": x.requires_grad_()}, seeded()).loss.backward()
    assert torch.equal(x.grad[:, 0] != 0, hidden_of_step(method, x))


def test_the_encoder_learns_from_its_first_layer_on(x):
    method = build()
    for parameter in method.parameters():  # residual branches start at zero
        parameter.data += 0.1 * torch.randn(parameter.shape)
    method({"x": x}, seeded()).loss.backward()
    # A bias before an instance norm has no effect and so no gradient but rounding; everything else must have one.
    idle = [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in idle if not name.endswith("bias")] == []


def test_a_block_that_does_not_divide_is_refused():
    encoder = build().encoder
    with pytest.raises(ValueError, match="not a multiple"):
        MAECNN(encoder, unit=(10, 16, 12))
