"""Golden outputs: what a set of weights gave for a known input when it was published.

They are a promise kept in a file: whoever loads the weights, on whatever machine and version, can check that the model
still computes what it did. The input is a formula, so that it need not be stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medmim.heads.segmenter import Segmenter
from medmim.layers.tokens import Size, to_grid_size

TOKENS = 8  # tokens kept of each output: enough to see any change, few enough to ship
VOXELS = 512  # likewise, of scores of classes


def golden_input(in_chans: int, img_size: Size) -> Tensor:
    """A smooth volume in [0, 1] with another pattern in each channel: (1, in_chans, D, H, W)."""
    axes = [torch.arange(side, dtype=torch.float64) / side for side in img_size]
    d, h, w = torch.meshgrid(*axes, indexing="ij")
    channels = [
        torch.sin(2 * math.pi * (2 + c) * d) * torch.cos(2 * math.pi * (3 + c) * h) * torch.sin(1 + 5 * w)
        for c in range(in_chans)
    ]
    return (torch.stack(channels)[None] / 2 + 0.5).float()


@torch.inference_mode()
def golden_outputs(model: nn.Module, decoder: nn.Module | None = None) -> dict[str, Tensor]:
    """What an encoder in evaluation mode, and its decoder when there is one, or a segmenter give for `golden_input`.

    Args:
        model: The encoder, or the segmenter.
        decoder: The encoder's pretraining decoder.

    Returns:
        Float32 on the CPU: "pooled" (C,), "tokens" (8, C), and with a decoder "hidden_patches" (8, V), predicted with
        every fourth one visible. Of a segmenter "scores" (K, some 512), of voxels from all over the volume.
    """
    x = golden_input(model.in_chans, model.img_size).to(next(model.parameters()))
    if isinstance(model, Segmenter):
        scores = model(x)[0].flatten(1)  # (K, D * H * W)
        # A stride that is odd visits other places of each row.
        return {"scores": scores[:, :: scores.shape[1] // VOXELS | 1].float().cpu().contiguous()}
    tokens = model.forward_features(x)
    outputs = {"pooled": model.forward_head(tokens, pre_logits=True)[0], "tokens": tokens[0, :TOKENS]}
    if decoder is not None:
        grid_size = to_grid_size(model.img_size, decoder.unit)
        everything = torch.arange(math.prod(grid_size), device=x.device)[None]
        idx_keep, idx_hidden = everything[:, ::4], everything[everything % 4 != 0][None]
        outputs["hidden_patches"] = decoder.predict(model, x, idx_keep, idx_hidden)[0, :TOKENS]
    return {name: tensor.float().cpu().contiguous() for name, tensor in outputs.items()}


def difference(outputs: Mapping[str, Tensor], golden: Mapping[str, Tensor]) -> str | None:
    """How outputs differ from golden ones by more than another machine's rounding, in words; None when they do not."""
    if outputs.keys() != golden.keys():
        return f"the model gives {', '.join(sorted(outputs))}, the file has {', '.join(sorted(golden))}"
    for name, tensor in outputs.items():
        if tensor.shape != golden[name].shape:
            return f"{name} has shape {tuple(tensor.shape)}, was {tuple(golden[name].shape)}"
        if not torch.allclose(tensor, golden[name], rtol=1e-3, atol=1e-4):
            return f"{name} is off by up to {(tensor - golden[name]).abs().max():.3g}"
    return None
