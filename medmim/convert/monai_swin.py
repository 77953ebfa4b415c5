"""Weights of MONAI's `SwinTransformer`, the encoder of its `SwinUNETR`; without `use_v2` and `patch_norm`.

MONAI before 1.5 (2025) merged patches otherwise, with weights of the same names and shapes. A model for weights trained
with it, such as those published with SwinUNETR, is built with `merged="repeated"`; no file says which it needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from medmim.errors import WeightsError
from medmim.layers.shifted_windows import relative_position_index
from medmim.layers.tokens import Size

_EMBED = r"(?P<embed>patch_embed\.proj\.(?:weight|bias))"
_STAGE = (
    r"(?:blocks\.\d+\.(?:(?:norm[12]|attn\.qkv|attn\.proj|mlp\.{mlp}[12])\.(?:weight|bias)|attn\.{attention})"
    r"|downsample\.(?:norm\.(?:weight|bias)|reduction\.weight))"
)
_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"

_OURS = re.compile(rf"{_EMBED}|stages\.(?P<stage>[0-3])\.(?P<rest>{_STAGE.format(mlp='fc', attention=_TABLE)})")
# "module." and fc1, fc2 are of the self-supervised weights published with SwinUNETR, which its `load_from` reads.
_THEIRS = re.compile(
    rf"(?:swinViT\.|module\.)?(?:{_EMBED}|layers(?P<stage>[1-4])\.0\."
    rf"(?P<rest>{_STAGE.format(mlp='(?:linear|fc)', attention=f'(?:{_TABLE}|{_INDEX})')}))"
)
_CONVOLUTIONS = re.compile(r"(?:encoder(?:1|2|3|4|10)|decoder[1-5]|out)\..*")  # the rest of a SwinUNETR


def from_swin_transformer(state: Mapping[str, Tensor], *, window_size: Size = (7, 7, 7)) -> dict[str, Tensor]:
    """Weights of a `SwinTransformer`, or of the one in a `SwinUNETR`, for our `SwinTransformer3D`.

    Args:
        state: State dict of either; the convolutions of a SwinUNETR are left out.
        window_size: Tokens of a window along (D, H, W); the position indices that MONAI stores are compared with it and
            left out, as they follow from it.

    Returns:
        A new state dict with the same tensors.

    Raises:
        WeightsError: For keys that are neither, two names of one tensor, or indices of other windows.
    """
    ours: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if _CONVOLUTIONS.fullmatch(key):
            continue
        match = _THEIRS.fullmatch(key)
        if match is None:
            raise WeightsError(
                f"{key!r} is not a tensor of MONAI's Swin transformer (without use_v2 and patch_norm); "
                "remove it if it is not needed"
            )
        if key.endswith(_INDEX):
            if not torch.equal(tensor, relative_position_index(window_size).to(tensor)):
                raise WeightsError(f"{key!r} is not for windows of {tuple(window_size)} tokens; give their window_size")
            continue
        if match["embed"]:
            name = match["embed"]
        else:
            name = f"stages.{int(match['stage']) - 1}.{match['rest'].replace('mlp.linear', 'mlp.fc')}"
        if name in ours:
            raise WeightsError(f"{key!r} is there under another name too; remove one of them")
        ours[name] = tensor
    return ours


def to_swin_transformer(state: Mapping[str, Tensor], *, window_size: Size = (7, 7, 7)) -> dict[str, Tensor]:
    """Weights of our `SwinTransformer3D`, of four stages, for a `SwinTransformer`.

    Args:
        state: State dict of an encoder without classifier.
        window_size: Tokens of a window along (D, H, W), from which the position indices that MONAI stores follow.

    Returns:
        A new state dict with the same tensors and the indices; before each key goes "swinViT." for a `SwinUNETR`.

    Raises:
        WeightsError: For keys that a `SwinTransformer` has no place for.
    """
    theirs: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = _OURS.fullmatch(key)
        if match is None:
            raise WeightsError(
                f"{key!r} has no place in MONAI's Swin transformer of four stages; "
                "a classifier goes with reset_classifier(0)"
            )
        if match["embed"]:
            theirs[key] = tensor
            continue
        name = f"layers{int(match['stage']) + 1}.0.{match['rest'].replace('mlp.fc', 'mlp.linear')}"
        theirs[name] = tensor
        if name.endswith(_TABLE):
            theirs[name.replace(_TABLE, _INDEX)] = relative_position_index(window_size).to(tensor.device)
    return theirs
