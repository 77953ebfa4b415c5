"""From a coarse grid back to voxels, in steps."""

from __future__ import annotations

import itertools

from medmim.layers.tokens import Size


def upsampling_strides(reduction: Size) -> list[Size]:
    """The strides, coarse to fine, whose product is `reduction`: the prime factors of each axis, large ones first.

    An axis with fewer factors than the others stands still in the last steps: patches are flat where slices are thick,
    so the coarse steps are those in which all axes have much the same length in millimetres.

    Args:
        reduction: Voxels along (D, H, W) to one position of the coarse grid.
    """
    factors = [sorted(_prime_factors(side), reverse=True) for side in reduction]
    return list(itertools.zip_longest(*factors, fillvalue=1))


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors
