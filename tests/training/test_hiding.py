"""Hiding rules: exact counts, and the shapes they promise, on a grid with three different sides."""

from __future__ import annotations

import pytest
import torch

from medmim_training.methods.hiding import RULES, Hiding

UNIT, GRID = (4, 2, 8), (4, 6, 3)
SIZE = tuple(u * g for u, g in zip(UNIT, GRID, strict=True))


def hide(x: torch.Tensor | None = None, *, seed: int = 0, **args) -> torch.Tensor:
    """What a rule hides, as a boolean grid (B, Dg, Hg, Wg)."""
    x = torch.rand(8, 2, *SIZE) if x is None else x
    idx_keep, idx_hidden = Hiding(**args)(x, UNIT, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([idx_keep, idx_hidden], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(72).expand(len(x), -1))
    return torch.zeros(len(x), 72, dtype=torch.bool).scatter(1, idx_hidden, True).view(-1, *GRID)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ratio", [0.4, 0.75, 0.9])
def test_every_rule_hides_the_exact_count_and_follows_its_generator(rule, ratio):
    hidden = hide(rule=rule, ratio=ratio)
    assert hidden.flatten(1).sum(dim=1).tolist() == [int(ratio * 72)] * 8
    x = torch.rand(8, 2, *SIZE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(hide(x, rule=rule), hide(x, rule=rule))
    assert not torch.equal(hide(x, rule=rule), hide(x, rule=rule, seed=1))


def test_blocks_are_boxes_of_the_grid():
    """All but one block of a sample are hidden as a whole or not at all."""
    hidden = hide(rule="block", block=(2, 3, 1))
    blocks = hidden.view(8, 2, 2, 2, 3, 3, 1).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).float().mean(dim=-1)
    partial = (blocks > 0) & (blocks < 1)
    assert partial.flatten(1).sum(dim=1).max() <= 1
    assert (blocks == 1).flatten(1).sum(dim=1).min() >= 8


def test_blocks_that_do_not_divide_the_grid_end_with_it():
    assert hide(rule="block", block=(3, 4, 2), ratio=0.5).flatten(1).sum(dim=1).tolist() == [36] * 8


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tubes_run_along_their_axis(axis):
    share = hide(rule="tube", axis=axis).float().mean(dim=axis + 1)
    assert ((share > 0) & (share < 1)).flatten(1).sum(dim=1).max() <= 1


def test_grid_leaves_a_lattice():
    hidden = hide(rule="grid", ratio=0.87)  # 62 of 72; at most 2 x 3 x 2 = 12 lie on a lattice of step 2
    for sample in ~hidden:
        visible = sample.nonzero()
        parity = visible % 2
        assert (parity == parity.mode(dim=0).values).all(dim=1).float().mean() >= 0.6


def test_foreground_is_hidden_more_often_than_air():
    x = torch.zeros(200, 1, *SIZE)
    x[:, :, :, : SIZE[1] // 2] = 1
    share = hide(x, rule="foreground", ratio=0.3).float().mean(dim=(0, 1, 3))
    assert share[:3].min() > 3 * share[3:].max()


@pytest.mark.parametrize("block", [(0, 1, 1), (2, 2), "222", (2, 2, 1.5)])
def test_a_block_without_tokens_is_refused(block):
    with pytest.raises(ValueError, match="must be three numbers of tokens above 0"):
        Hiding(rule="block", block=block)


@pytest.mark.parametrize("args", [{"rule": "random"}, {"ratio": 0.0}, {"ratio": 1.0}, {"rule": "tube", "axis": 3}])
def test_what_cannot_be_is_refused(args):
    with pytest.raises(ValueError, match=str(next(reversed(args.values())))):
        Hiding(**args)
