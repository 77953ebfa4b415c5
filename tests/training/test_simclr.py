"""The contrastive comparison: its loss, its views, and that it trains the encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import ContrastiveLoss

from medmim.models.vit import VisionTransformer3D
from medmim_training.methods.augment import random_appearance
from medmim_training.methods.losses import nt_xent
from medmim_training.methods.simclr import SimCLR
from medmim_training.store.views import OverlappingCrops, anywhere


def test_nt_xent_equals_monai():
    first, second = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nt_xent(first, second, temperature=0.5), ContrastiveLoss(temperature=0.5)(first, second))


def test_nt_xent_is_not_rounded_under_autocast():
    first, second = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = nt_xent(first, second, temperature=0.05)
    assert torch.equal(rounded, nt_xent(first, second, temperature=0.05))


def test_nt_xent_is_lowest_for_partners():
    first = torch.eye(6)
    aligned, crossed = nt_xent(first, first, temperature=0.1), nt_xent(first, first.roll(1, 0), temperature=0.1)
    assert aligned < 0.01 < 5 < crossed


@pytest.mark.parametrize("shape", [(40, 50, 60), (10, 50, 18)], ids=["larger", "smaller"])
def test_views_overlap_as_much_as_promised(shape):
    size, generator = (16, 24, 20), np.random.default_rng(0)
    for _ in range(200):
        starts = OverlappingCrops(count=3, overlap=0.6).starts(anywhere(shape, size, generator), shape, size, generator)
        assert starts.shape == (3, 3)
        shared = np.array(size) - np.abs(starts[1:] - starts[0])
        assert (shared >= 0.6 * np.array(size)).all()
        room = np.array(shape) - size
        assert ((starts >= np.minimum(room, 0)) & (starts <= np.maximum(room, 0))).all()


def test_one_crop_reaches_every_place():
    generator = np.random.default_rng(0)
    starts = np.stack([anywhere((6, 4, 2), (4, 4, 4), generator) for _ in range(200)])
    assert [set(axis) for axis in starts.T.tolist()] == [{0, 1, 2}, {0}, {-2, -1, 0}]


def build() -> SimCLR:
    torch.manual_seed(0)
    encoder = VisionTransformer3D((16, 32, 24), (8, 8, 8), embed_dim=48, depth=2, num_heads=4)
    return SimCLR(encoder, hidden_dim=64, out_dim=16)


def test_every_parameter_learns_and_the_first_layer_too():
    method = build()
    x = torch.rand(3, 2, 1, 16, 32, 24, generator=torch.Generator().manual_seed(0))
    output = method({"x": x}, torch.Generator().manual_seed(0))
    output.loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert output.logs["spread"] > 0


def test_partners_are_the_two_views_of_a_sample(monkeypatch):
    monkeypatch.setattr("medmim_training.methods.simclr.random_appearance", lambda x, generator: x)
    method = build().eval()
    x = torch.rand(4, 1, 1, 16, 32, 24, generator=torch.Generator().manual_seed(0))
    same = method({"x": x.expand(-1, 2, -1, -1, -1, -1)}).loss
    crossed = method({"x": torch.cat([x, x.roll(1, 0)], dim=1)}).loss
    assert same < crossed


def test_appearance_changes_values_and_not_places():
    x = torch.rand(4, 1, 8, 12, 10, generator=torch.Generator().manual_seed(0))
    first, again, other = (random_appearance(x, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    correlation = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(x.numpy(), first.numpy(), strict=True)]
    assert min(correlation) > 0.5
    assert random_appearance(torch.zeros(1, 1, 4, 4, 4), generator=torch.Generator().manual_seed(0)).isfinite().all()


@pytest.mark.parametrize("args", [{"temperature": 0.0}, {"overlap": 0.0}, {"overlap": 1.1}])
def test_what_cannot_be_is_refused(args):
    with pytest.raises(ValueError, match="must be above 0"):
        SimCLR(build().encoder, **args)
