"""Models and records of weights for tests: real in form, tiny, random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import medmim
from medmim.heads.mae import MAEDecoder
from medmim.spec import ModelSpec

# By family: non-cubic volumes, anisotropic patches. A new family needs a line here to be tested.
TINY = {
    "vit": {"img_size": (32, 48, 16), "patch_size": (8, 16, 8), "embed_dim": 48, "depth": 2, "num_heads": 2},
    "resenc": {"img_size": (32, 48, 16), "strides": (1, (2, 4, 2)), "channels": (8, 12), "depths": (1, 2)},
    "swin": {
        "img_size": (32, 48, 16),
        "patch_size": (4, 4, 2),
        "embed_dim": 12,
        "depths": (2, 1),
        "num_heads": (2, 3),
        "window_size": (3, 4, 3),
    },
}

# Segmentation decoders that a family's encoders fit.
FITTING = {
    "vit": ("unetr", "light", "linear"),
    "resenc": ("unet", "light", "linear"),
    "swin": ("unet", "light", "linear"),
}

RECORD = {
    "tag": "fake",
    "license": "CC-BY-4.0",
    "citation": "@misc{fake, title={Fake weights}}",
    "volume": {
        "orientation": "RAS",
        "spacing": [2.0, 2.0, 3.0],
        "intensity": {"CT": {"kind": "window", "low": -1000, "high": 1000}, "MR": {"kind": "percentile"}},
    },
    "decoder_spec": {"kind": "mae", "args": {"embed_dim": 24, "depth": 1, "num_heads": 2}},
}

TRAINING = {
    "method": "mae",
    "recipe": "small/vit_t_mae3d",
    "steps": 100,
    "crops": 800,
    "volumes": 12,
    "wall_hours": 1.5,
    "cpu_hours": 3.0,
    "hardware": "2 CPU cores",
    "final_loss": 0.04,
    "date": "2026-11-24",
    "data": [{"name": "pool", "volumes": 12, "modality": "CT", "license": "CC-BY-4.0"}],
}


def tiny_model(name: str = "vit_t_mae3d", **args: Any) -> nn.Module:
    """An untrained model of the catalog at a tiny size, the same at each call."""
    torch.manual_seed(0)
    return medmim.create_model(name, **{**TINY[medmim.model_info(name).family], **args})


def tiny_decoder(model: nn.Module) -> MAEDecoder:
    torch.manual_seed(1)
    return MAEDecoder(
        model.num_features,
        model.grid_size,
        patch_size=model.patch_size,
        in_chans=model.in_chans,
        **RECORD["decoder_spec"]["args"],
    )


def save_tiny(folder: Path, **args: Any) -> ModelSpec:
    """Saves a tiny model with a decoder and a full record of weights."""
    model = tiny_model(**args)
    return medmim.save_pretrained(model, folder, decoder=tiny_decoder(model), weights=RECORD)
