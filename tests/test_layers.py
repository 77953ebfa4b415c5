"""Token order, positions, the transformer block and convolutions, on non-cubic grids with anisotropic patches."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from medmim.layers.convolution import Conv3d
from medmim.layers.position import resample_position, sincos_position
from medmim.layers.tokens import (
    gather_patches,
    gather_tokens,
    hidden_voxels,
    patchify,
    random_hiding,
    scatter_tokens,
    to_grid_size,
    unpatchify,
)
from medmim.layers.transformer import Block

SIZE, PATCH, GRID = (32, 48, 64), (8, 16, 32), (4, 3, 2)


@pytest.fixture
def volumes() -> torch.Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def test_unpatchify_is_the_exact_inverse(volumes):
    patches = patchify(volumes, PATCH)
    assert patches.shape == (2, math.prod(GRID), 3 * math.prod(PATCH))
    assert torch.equal(unpatchify(patches, PATCH, GRID), volumes)


def test_a_token_is_the_box_its_grid_position_says(volumes):
    patches = patchify(volumes, PATCH)
    d, h, w = 2, 1, 1
    box = volumes[:, :, 16:24, 16:32, 32:64]
    assert torch.equal(patches[:, (d * GRID[1] + h) * GRID[2] + w], box.flatten(1))


def test_gather_patches_equals_gathering_all(volumes):
    idx, _ = random_hiding(2, math.prod(GRID), 0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(gather_patches(volumes, idx, PATCH), gather_tokens(patchify(volumes, PATCH), idx))


def test_a_side_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        to_grid_size((32, 48, 60), PATCH)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6, 0.75, 0.9])
def test_hiding_is_a_partition_with_the_exact_count(ratio):
    tokens = 24
    keep, hidden = random_hiding(5, tokens, ratio, generator=torch.Generator().manual_seed(0))
    assert hidden.shape == (5, int(ratio * tokens))
    assert torch.equal(torch.cat([keep, hidden], dim=1).sort(dim=1).values, torch.arange(tokens).expand(5, -1))
    assert (keep.diff() > 0).all()
    assert (hidden.diff() > 0).all()


def test_hiding_follows_its_generator():
    first, again, other = (random_hiding(4, 24, 0.5, generator=torch.Generator().manual_seed(s))[0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_hiding_is_uniform():
    _, hidden = random_hiding(4000, 12, 0.75, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(hidden.flatten(), minlength=12) / 4000
    assert (share - 0.75).abs().max() < 0.04  # six standard deviations


@pytest.mark.parametrize("ratio", [0.0, 0.01, 1.0])
def test_hiding_nothing_or_everything_is_refused(ratio):
    with pytest.raises(ValueError, match="at least one"):
        random_hiding(1, 24, ratio)


def test_hidden_voxels_are_those_of_the_hidden_tokens(volumes):
    keep, hidden = random_hiding(2, math.prod(GRID), 0.75, generator=torch.Generator().manual_seed(0))
    where = hidden_voxels(hidden, PATCH, GRID).expand_as(volumes)
    assert torch.equal(volumes[where].sort().values, gather_patches(volumes, hidden, PATCH).flatten().sort().values)
    visible = gather_patches(where.float(), keep, PATCH)
    assert not visible.any()


def test_scatter_undoes_gather():
    tokens = torch.randn(2, 24, 5)
    keep, hidden = random_hiding(2, 24, 0.5, generator=torch.Generator().manual_seed(0))
    rebuilt = scatter_tokens(torch.zeros_like(tokens), keep, gather_tokens(tokens, keep))
    assert torch.equal(scatter_tokens(rebuilt, hidden, gather_tokens(tokens, hidden)), tokens)


def test_sincos_is_the_formula():
    table = sincos_position(GRID, 24)[0].view(*GRID, 3, 2, 4)  # axis, sine or cosine, frequency
    omega = [10000 ** (-i / 4) for i in range(4)]
    for axis, position in enumerate((3, 1, 1)):
        sine, cosine = table[3, 1, 1, axis]
        torch.testing.assert_close(sine, torch.tensor([math.sin(position * w) for w in omega]))
        torch.testing.assert_close(cosine, torch.tensor([math.cos(position * w) for w in omega]))


def test_sincos_tells_all_positions_apart_and_pads_odd_widths_with_zeros():
    table = sincos_position(GRID, 28)[0]
    assert table.shape == (24, 28)
    assert not table[:, 24:].any()
    assert torch.cdist(table, table).add(torch.eye(24)).min() > 0.1
    with pytest.raises(ValueError, match="at least 6"):
        sincos_position(GRID, 5)


def test_sincos_starts_at_any_place():
    table = sincos_position((4, 4, 4), 24, (-1, 0.5, 1))[0].view(4, 4, 4, 24)
    torch.testing.assert_close(table[1:, :, :3, :8], sincos_position((3, 4, 3), 24)[0].view(3, 4, 3, 24)[..., :8])
    torch.testing.assert_close(table[0, 0, 0, 8], torch.tensor(0.5).sin())
    torch.testing.assert_close(table[..., 16:], sincos_position((4, 4, 5), 24)[0].view(4, 4, 5, 24)[:, :, 1:, 16:])


def test_resampled_positions_keep_a_linear_ramp_along_each_axis():
    d, h, w = GRID
    axes = torch.meshgrid(*[(torch.arange(n) + 0.5) / n for n in GRID], indexing="ij")
    ramp = torch.stack(axes, dim=-1).view(1, d * h * w, 3)
    assert resample_position(ramp, GRID, GRID) is ramp
    fine = resample_position(ramp, GRID, (8, 9, 6)).view(8, 9, 6, 3)
    # Half-voxel borders are extrapolated as constants; inside, trilinear resampling is exact on a ramp.
    torch.testing.assert_close(fine[2:6, 4, 3, 0], (torch.arange(2, 6) + 0.5) / 8)
    torch.testing.assert_close(fine[4, 2:7, 3, 1], (torch.arange(2, 7) + 0.5) / 9)
    torch.testing.assert_close(fine[4, 4, 2:4, 2], (torch.arange(2, 4) + 0.5) / 6)


@pytest.mark.parametrize("init_values", [None, 0.1])
def test_block_equals_timm(init_values):
    ours = Block(48, 4, init_values=init_values).eval()
    timms = TimmBlock(48, 4, qkv_bias=True, init_values=init_values, norm_layer=partial(nn.LayerNorm, eps=1e-6)).eval()
    timms.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 7, 48)
    torch.testing.assert_close(ours(x), timms(x), rtol=0, atol=1e-5)


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    block = Block(12, 2, drop_path=0.5)
    x = torch.ones(400, 3, 12)
    torch.manual_seed(0)
    out = block.drop_path(x)
    kept = out[:, 0, 0] != 0
    assert torch.equal(out, torch.where(kept[:, None, None], 2.0, 0.0).expand_as(out))
    assert 0.4 < kept.float().mean() < 0.6
    assert torch.equal(block.eval().drop_path(x), x)


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "bf16 weights"])
@pytest.mark.parametrize("size", [(1, 2, 2), (2, 2, 2), (2, 4, 3), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
def test_gradients_of_convolutions_over_small_maps_are_right_in_bf16(size, bias, whole):
    torch.manual_seed(0)
    exact = Conv3d(16, 32, 3, padding=1, bias=bias)
    rounded = copy.deepcopy(exact).to(torch.bfloat16 if whole else torch.float32)
    x, given = torch.randn(2, 16, *size), torch.randn(2, 32, *size)
    exact(x).backward(given)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        y = rounded(x.bfloat16() if whole else x)
    y.backward(given.to(y.dtype))
    for one, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert (other.grad - one.grad).norm() < 0.02 * one.grad.norm()


def test_a_convolution_over_a_small_map_is_as_exact_as_its_numbers():
    double = Conv3d(4, 4, 3, padding=1).double()
    x = torch.rand(1, 4, 2, 2, 2, dtype=torch.float64)
    expected = torch.nn.functional.conv3d(x, double.weight, double.bias, padding=1)
    torch.testing.assert_close(double(x), expected, rtol=0, atol=1e-12)
