"""Which tokens to hide: every rule is a score per token, and the highest scores are hidden by exact count.

Legend: B batch, (Dg, Hg, Wg) grid of hiding units, N = Dg*Hg*Wg. Scores are (B, N), row-major over the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medmim.layers.tokens import Size, hide_highest, to_grid_size
from medmim_training.methods.draws import Generators, uniform


@dataclass(frozen=True, kw_only=True)
class Hiding:
    """A hiding rule.

    Args:
        rule: "uniform" tokens; "block": cubes of `block` tokens; "tube": whole lines of tokens along `axis`; "grid":
            all but a regular lattice, at a random offset; "foreground": tokens with a probability that grows with
            their share of foreground.
        ratio: Share of the tokens to hide, exactly `int(ratio * N)` of each sample. Of a block or a tube that would
            exceed the count, a part is hidden.
        block: Tokens of a block along (D, H, W), for "block".
        axis: 0, 1 or 2, for "tube".

    Raises:
        ValueError: For an unknown rule or axis, a block without tokens, or a ratio outside of (0, 1).
    """

    rule: Literal["uniform", "block", "tube", "grid", "foreground"] = "uniform"
    ratio: float = 0.75
    block: Size = (2, 2, 2)
    axis: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"hiding rule is {self.rule!r}; it must be one of {', '.join(RULES)}")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio {self.ratio} must be above 0 and below 1")
        if self.axis not in (0, 1, 2):
            raise ValueError(f"axis {self.axis} must be 0, 1 or 2")
        if len(self.block) != 3 or not all(type(side) is int and side > 0 for side in self.block):
            raise ValueError(f"block {self.block} must be three numbers of tokens above 0")

    def __call__(self, x: Tensor, unit: Size, *, generator: Generators) -> tuple[Tensor, Tensor]:
        """Chooses what to hide of each sample.

        Args:
            x: Volumes (B, C, D, H, W); only "foreground" looks at the voxels.
            unit: Voxels along (D, H, W) that are hidden together; each side divides the volume's.
            generator: On the CPU, one for the batch or one a sample.

        Returns:
            `idx_keep` (B, N - K) and `idx_hidden` (B, K), ascending, on the device of `x`.
        """
        idx_keep, idx_hidden = hide_highest(RULES[self.rule](self, x, unit, generator), self.ratio)
        return idx_keep.to(x.device), idx_hidden.to(x.device)


Rule = Callable[[Hiding, Tensor, Size, Generators], Tensor]  # (rule, x, unit, generator) -> scores (B, N)


def _uniform(hiding: Hiding, x: Tensor, unit: Size, generator: Generators) -> Tensor:
    return uniform(len(x), math.prod(_grid_of(x, unit)), generator=generator)


def _block(hiding: Hiding, x: Tensor, unit: Size, generator: Generators) -> Tensor:
    grid_size = _grid_of(x, unit)
    coarse = [math.ceil(side / size) for side, size in zip(grid_size, hiding.block, strict=True)]
    number = torch.arange(math.prod(coarse)).view(coarse)
    for axis, size in enumerate(hiding.block):
        number = number.repeat_interleave(size, dim=axis).narrow(axis, 0, grid_size[axis])
    return _by_group(number, math.prod(coarse), len(x), generator)


def _tube(hiding: Hiding, x: Tensor, unit: Size, generator: Generators) -> Tensor:
    grid_size = _grid_of(x, unit)
    cross_section = [1 if axis == hiding.axis else side for axis, side in enumerate(grid_size)]
    count = math.prod(cross_section)
    return _by_group(torch.arange(count).view(cross_section).expand(grid_size), count, len(x), generator)


def _grid(hiding: Hiding, x: Tensor, unit: Size, generator: Generators) -> Tensor:
    # Visible tokens lie on every step-th plane of each axis; the count is then made exact at random.
    grid_size = _grid_of(x, unit)
    step = max(2, round((1 - hiding.ratio) ** (-1 / 3)))
    offsets = (uniform(len(x), 3, generator=generator) * step).long()
    on_lattice = torch.ones(len(x), *grid_size, dtype=torch.bool)
    for axis, side in enumerate(grid_size):
        planes = (torch.arange(side) + offsets[:, axis, None]) % step == 0  # (B, side)
        on_lattice &= planes.view(-1, *(side if other == axis else 1 for other in range(3)))
    off_lattice = (~on_lattice).flatten(1)
    return off_lattice + uniform(*off_lattice.shape, generator=generator)


def _foreground(hiding: Hiding, x: Tensor, unit: Size, generator: Generators) -> Tensor:
    # Gumbel noise on log-weights draws without replacement in proportion to the weights (Vieira 2014).
    means = F.avg_pool3d(x.float().mean(dim=1, keepdim=True), unit).flatten(1).cpu()  # (B, N)
    means = means - means.amin(dim=1, keepdim=True)
    weights = means / means.amax(dim=1, keepdim=True).clamp(min=1e-6) + 0.1  # air is hidden too, but seldom
    noise = uniform(*weights.shape, generator=generator).clamp(min=1e-9)
    return weights.log() - (-noise.log()).log()


def _grid_of(x: Tensor, unit: Size) -> Size:
    return to_grid_size(tuple(x.shape[2:]), unit)


def _by_group(group: Tensor, count: int, batch: int, generator: Generators) -> Tensor:
    """Scores that hide whole groups in random order; `group` (Dg, Hg, Wg) numbers each token's, of `count`, from 0."""
    group = group.flatten()
    rank = uniform(batch, count, generator=generator).argsort(dim=1)
    # Ranks are whole numbers apart, so the noise below 1 orders tokens inside a group only.
    return rank[:, group] + uniform(batch, len(group), generator=generator)


RULES: dict[str, Rule] = {
    "uniform": _uniform,
    "block": _block,
    "tube": _tube,
    "grid": _grid,
    "foreground": _foreground,
}
