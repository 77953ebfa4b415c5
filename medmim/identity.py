"""Which model it is, to tell what one computed from what another did."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

SHOWN = 16  # hexadecimal digits of a digest that people see


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, also of what `torch.compile` made of it: that is of another class, with other names inside."""
    return getattr(model, "_orig_mod", model)


def weights_digest(model: nn.Module) -> str:
    """The sha256 of all parameters and buffers that a file would store, with their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in uncompiled(model).state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def name_of(model: Any) -> str:
    """What a model is called: as its spec says, else as its class."""
    spec = getattr(model, "spec", None)
    return type(model).__name__ if spec is None else spec.name


def identity(model: nn.Module, *, modality: str | None = None) -> str:
    """A model's name and the start of the digest of its weights: "vit_t_mae3d.open_mix sha256:0123456789abcdef".

    Names alone would not do: what was fine-tuned from one encoder has one name, whatever the data were.

    Args:
        model: Which.
        modality: What it is told that scans are, as which it computes something else; it follows as " for CT".
    """
    told = f" for {modality}" if modality else ""
    return f"{name_of(model)} sha256:{weights_digest(model)[:SHOWN]}{told}"
