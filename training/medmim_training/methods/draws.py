"""Random numbers for a batch, from one generator or from one for each sample.

With one generator a sample, what happens to a sample does not depend on which others share its batch: a batch split
over ranks or accumulated in parts is treated as the whole one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def uniform(batch: int, *shape: int, generator: Generators) -> Tensor:
    """Uniform numbers in [0, 1): (batch, *shape) on the CPU.

    Args:
        batch: Rows; a multiple of the number of generators, each of which makes consecutive ones (a sample's views).
        shape: Of a row.
        generator: One for all rows, a sequence with one for each sample, or None for torch's own.
    """
    return _draw(torch.rand, batch, shape, generator)


def normal(batch: int, *shape: int, generator: Generators) -> Tensor:
    """Standard normal numbers, otherwise as `uniform`."""
    return _draw(torch.randn, batch, shape, generator)


def _draw(function, batch: int, shape: tuple[int, ...], generator: Generators) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        return function(batch, *shape, generator=generator)
    rows = batch // len(generator)
    return torch.cat([function(rows, *shape, generator=each) for each in generator])
