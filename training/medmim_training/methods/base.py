"""What every method gives the engine, and the few lines that methods share.

A method is a module made of the encoder it is given (`encoder`) and of what is thrown away afterwards. It has
`views`, the boxes that make a sample; `forward(batch, generator) -> MethodOutput`; `no_weight_decay()`;
`decoder_spec`, what builds its `decoder` elsewhere when that is published beside the encoder, else None; and
`compares_samples`, whether the loss of a batch is another than the mean of its parts' losses.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from medmim.errors import SpecError
from medmim.layers.tokens import (
    Size,
    gather_patches,
    hidden_voxels,
    patchify,
    scatter_tokens,
    to_grid_size,
    unpatchify,
)
from medmim.reconstruction import Reconstruction

Choice = TypeVar("Choice")


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


def check_arguments(given: Iterable[str], accepted: Callable[..., object], *, name: str, key: str) -> None:
    """Refuses arguments that do not exist, by their key in a recipe and with the nearest that do.

    Args:
        given: Names of arguments.
        accepted: What they are for.
        name: What that is called, in the error.
        key: Of the recipe, where they stand.

    Raises:
        SpecError: For the first one.
    """
    known = [parameter for parameter in inspect.signature(accepted).parameters if parameter != "encoder"]
    for argument in given:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise SpecError(f"{key}.{argument} is no argument of {name}; {hint}")


def named_choice(what: str, name: str, known: Mapping[str, Choice]) -> Choice:
    """`known[name]`.

    Raises:
        ValueError: For another name, with those there are.
    """
    if name not in known:
        raise ValueError(f"{what} is {name!r}; it must be one of {', '.join(known)}")
    return known[name]


def inside_scan(batch: Mapping[str, Tensor], idx_hidden: Tensor, unit: Size) -> Tensor | None:
    """Which voxels of hidden units lie inside the scan: what lies outside of it is unknown, not to be predicted.

    Args:
        batch: "x" and "inside", as `CropDataset` makes them.
        idx_hidden: (B, M).
        unit: Voxels of a unit along (D, H, W).

    Returns:
        Boolean (B, M, V), or None when all crops lie inside of their scans, or the batch does not say.
    """
    if "inside" not in batch:
        return None
    channels, *size = batch["x"].shape[2:]
    first, stop = batch["inside"].flatten(0, 1)[..., None].unbind(2)  # (B, 3, 1) each
    inside = [
        (place >= first[:, axis]) & (place < stop[:, axis])  # (B, side)
        for axis, place in enumerate(torch.arange(side, device=first.device) for side in size)
    ]
    if all(bool(line.all()) for line in inside):
        return None
    d, h, w = inside
    voxels = d[:, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, None, :]  # (B, 1, D, H, W)
    return gather_patches(voxels.expand(-1, channels, -1, -1, -1), idx_hidden, unit)


def paste(x: Tensor, predicted: Tensor, idx_hidden: Tensor, unit: Size) -> Reconstruction:
    """The first sample with its hidden units replaced by what was predicted for them.

    Args:
        x: Volumes (B, C, D, H, W).
        predicted: Voxels of the hidden units, (B, M, V).
        idx_hidden: Which units they are, (B, M).
        unit: Voxels of a unit along (D, H, W).
    """
    first, idx = x[:1].detach(), idx_hidden[:1]
    grid_size = to_grid_size(first.shape[2:], unit)
    patches = scatter_tokens(patchify(first, unit), idx, predicted[:1].detach().to(first))
    hidden = hidden_voxels(idx, unit, grid_size)
    return Reconstruction(original=first[0], hidden=hidden[0, 0], prediction=unpatchify(patches, unit, grid_size)[0])
