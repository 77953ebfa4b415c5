"""A wide transformer that starts where a narrow one stopped: each channel, head and hidden unit is copied.

After Net2Net (Chen et al. 2016, arXiv 1511.05641), for transformers as Chen et al. 2022 (bert2BERT, arXiv 2110.07143):
what writes a channel writes all its copies, what reads it takes shares of them that add up to one, so the wide network
computes what the narrow one does. Shares are random, or copies would stay copies. With fixed sine-cosine positions it
does so only nearly, and at once better: between two frequencies of the narrow table lie those of the wide one, so the
copies of a channel get slightly different positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medmim.errors import SpecError

WIDTH = ("embed_dim", "num_heads")  # the arguments of an encoder that may differ
SPREAD = 0.5  # of the shares, about their mean


def widen_encoder(narrow: nn.Module, wide: nn.Module, *, seed: int) -> dict[str, Tensor]:
    """The state of `wide` that computes what `narrow` does.

    Args:
        narrow: A `VisionTransformer3D`.
        wide: Another one, a whole number of times as wide and with as many times its heads, all else the same.
        seed: Of the shares.

    Raises:
        SpecError: When they differ in anything but their width.
    """
    factor, rest = divmod(wide.num_features, narrow.num_features)
    wanted = wide.state_dict()
    widened: dict[str, Tensor] = {}
    if not rest and getattr(wide, "num_heads", 0) == factor * getattr(narrow, "num_heads", -1):
        generator = torch.Generator().manual_seed(seed)
        widened = {
            name: _widen(name, weight, factor, narrow.num_heads, generator)
            for name, weight in narrow.state_dict().items()
        }
    if {name: weight.shape for name, weight in widened.items()} != {name: w.shape for name, w in wanted.items()}:
        raise SpecError(
            "weights can be widened only to a plain transformer of the same depth and patches, a whole number of times "
            "as wide and with as many times the heads"
        )
    return widened


def widen_decoder(state: Mapping[str, Tensor], factor: int, *, seed: int) -> dict[str, Tensor]:
    """The state of an MAE decoder behind an encoder `factor` times as wide: it only reads more channels."""
    read = _shared(state["embed.weight"], factor, torch.Generator().manual_seed(seed))
    return {**state, "embed.weight": read}


def _widen(name: str, weight: Tensor, factor: int, heads: int, generator: torch.Generator) -> Tensor:
    """One weight; copies of a channel are neighbours, as are those of a head."""
    if ".qkv." in name:
        by_head = weight.unflatten(0, (3, heads, -1)).repeat_interleave(factor, dim=1).flatten(0, 2)
        return by_head if by_head.ndim == 1 else _shared(by_head, factor, generator)
    if name.endswith("attn.proj.weight"):
        by_head = weight.unflatten(1, (heads, -1)).movedim(2, 0)  # (C / heads, C, heads)
        shared = torch.stack([_shared(each, factor, generator) for each in by_head], dim=2)
        return shared.flatten(1).repeat_interleave(factor, dim=0)
    if weight.ndim == 2:
        return _shared(weight.repeat_interleave(factor, dim=0), factor, generator)
    channels = -1 if weight.ndim == 3 else 0  # of tokens and positions; of vectors and the patch embedding
    return weight.repeat_interleave(factor, dim=channels)


def _shared(weight: Tensor, factor: int, generator: torch.Generator) -> Tensor:
    """(O, I) as (O, I * factor): shares of each weight for the copies of what it reads."""
    noise = torch.randn(*weight.shape, factor, generator=generator)
    shares = (1 + SPREAD * (noise - noise.mean(-1, keepdim=True))) / factor
    return (weight[..., None] * shares).flatten(1)
