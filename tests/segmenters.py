"""Segmenters whose labels are known."""

from __future__ import annotations

import torch
from torch import nn

import medmim
from fakes import tiny_model
from medmim.heads.segmenter import Segmenter
from medmim.spec import VolumeSpec

CLASSES = ("background", "rim", "core")
VOLUME = VolumeSpec.parse(
    {"orientation": "RAS", "intensity": {"MR": {"kind": "window", "low": 0, "high": 1000}}}, source="test"
)


class Thresholds(Segmenter):
    """Labels each voxel by its value alone: 0 below a third, 1 below two thirds, else 2."""

    def __init__(self, num_classes: int = 3, **sizes):
        nn.Module.__init__(self)
        self.encoder = tiny_model(**sizes)
        self.num_classes = num_classes
        self.spec = self.encoder.spec
        task = {"kind": "segmentation", "classes": CLASSES, "decoder": {"kind": "linear"}, "volume": VOLUME}
        self.spec = medmim.ModelSpec.parse({**self.spec.to_data(), "task": task}, source="test")
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        assert not self.training
        centres = torch.arange(self.num_classes)[:, None, None, None] / 2
        return -(x - centres).abs()


class Random(Thresholds):
    """A network that looks around: scores of neighbouring voxels are mixed, and the border of a window is seen."""

    def __init__(self, num_classes: int = 3, **sizes):
        super().__init__(num_classes, **sizes)
        self.mix = nn.Conv3d(1, num_classes, 5, padding=2)
        nn.init.normal_(self.mix.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        return self.mix(x)


def noise(*shape) -> torch.Tensor:
    return torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
