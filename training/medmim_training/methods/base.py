"""What every method gives the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from medmim.reconstruction import Reconstruction


@dataclass(frozen=True)
class MethodOutput:
    """One step's result.

    Attributes:
        loss: Scalar, with its graph.
        logs: Detached scalars worth a curve.
        picture: Makes the reconstruction of the batch's first sample when called, for methods that reconstruct.
    """

    loss: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)
    picture: Callable[[], Reconstruction] | None = None
