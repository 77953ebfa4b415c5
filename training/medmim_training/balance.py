"""Weights of a transformer in which positions count more.

A patch of thousands of voxels, none of them negative, drives every weight of its projection the same way, and a step of
Adam is as large for each. So tokens grow in training along the brightness of their patch until the fixed positions,
which cannot grow, are lost beside it: the encoder knows what it looks at but hardly where, and what is fine-tuned from
it has to learn that anew. Training that goes on from balanced weights keeps both; a low rate of the projection
(`optimizer.lr_scale`) keeps the balance.
"""

from __future__ import annotations

import torch
from torch import nn

from medmim.errors import SpecError
from medmim.models.vit import VisionTransformer3D


@torch.no_grad()
def raise_positions(encoder: nn.Module, gain: float) -> None:
    """Makes positions count `gain` times as much as they did, in place.

    All else that is ever added to a token is divided by the gain. As each block norms its input, the encoder computes
    what it would with its positions multiplied.

    Args:
        encoder: A plain transformer.
        gain: Above 0; 1 leaves any encoder as it is.

    Raises:
        SpecError: For another kind of encoder.
    """
    if gain == 1:
        return
    if not isinstance(encoder, VisionTransformer3D):
        raise SpecError("model.position_gain is for plain transformers, whose positions are added to tokens")
    added = [encoder.patch_embed.proj]
    for block in encoder.blocks:
        added += [block.attn.proj, block.mlp.fc2]
    for layer in added:
        layer.weight /= gain
        layer.bias /= gain
    for token in (encoder.cls_token, encoder.reg_token):
        if token is not None:
            token /= gain
