"""Training samples of labelled cases: sample number i is a function of the seed and i alone, as in pretraining."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
)
from torch import Tensor

from medmim.layers.tokens import Size
from medmim_training.loading import Samples, Tensors
from medmim_training.tasks.cases import LoadedCase, pad_around
from medmim_training.tasks.recipe import ChangeSection, CropSection

KEYS = ("x", "labels")
SAMPLED = 10_000  # voxels of a class that a crop may be put around: enough, and few to keep


class LabelledCrops(Samples):
    """An endless sequence of crops, cut to `length`; each case is as likely as any other.

    Args:
        cases: All of them, in memory.
        size: Voxels of a crop along (D, H, W); cases that are smaller are padded with their minimum, label 0.
        length: Number of samples.
        seed: Decides all samples.
        settings: How crops are drawn and changed.
    """

    def __init__(
        self, cases: Sequence[LoadedCase], size: Size, *, length: int, seed: int, settings: CropSection
    ) -> None:
        self.size, self.length, self.seed, self.settings = size, length, seed, settings
        self.volumes = Tensors(pad_around(case.x, size, value=float(case.x.min()))[0] for case in cases)
        self.labels = Tensors(pad_around(case.labels[None], size, value=0)[0][0] for case in cases)
        generator = np.random.default_rng(0)
        self.places = [_places_of_classes(labels, generator) for labels in self.labels]
        self.change = _changes(settings, KEYS)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample `index`: "x" (C, *size) float32, "labels" (1, *size) float32, and "case", its number."""
        generator = np.random.default_rng([self.seed, index])
        case = int(generator.integers(len(self.volumes)))
        x, labels = self.volumes[case], self.labels[case]
        crop = tuple(
            slice(start, start + side)
            for start, side in zip(self._start(case, labels.shape, generator), self.size, strict=True)
        )
        self.change.set_random_state(seed=int(generator.integers(2**31)))
        sample = self.change({"x": x[:, *crop], "labels": labels[crop][None].float()})
        return {key: sample[key].as_tensor().contiguous() for key in KEYS} | {"case": torch.tensor(case)}

    def _start(self, case: int, shape: Size, generator: np.random.Generator) -> list[int]:
        """Where the crop starts: around a voxel of some class, or anywhere."""
        room = np.array(shape) - self.size
        places = self.places[case]
        if not places or generator.random() >= self.settings.foreground:
            return generator.integers(0, room + 1).tolist()
        voxels = places[generator.integers(len(places))]  # (n, 3)
        centre = voxels[generator.integers(len(voxels))]
        # Anywhere that has the voxel inside; around the middle would never show it at the rim.
        low = np.clip(centre - np.array(self.size) + 1, 0, room)
        high = np.clip(centre, 0, room)
        return generator.integers(low, high + 1).tolist()


class ChangedVolumes(Samples):
    """An endless sequence of whole volumes with their classes, cut to `length`; each is as likely as any other.

    Args:
        volumes: (C, D, H, W) float32 each, all of one size, in memory.
        classes: The number of the class of each.
        length: Number of samples.
        seed: Decides all samples.
        settings: How they are changed.
    """

    def __init__(
        self, volumes: Sequence[Tensor], classes: Sequence[int], *, length: int, seed: int, settings: ChangeSection
    ) -> None:
        self.volumes, self.classes, self.length, self.seed = Tensors(volumes), classes, length, seed
        self.change = _changes(settings, ("x",))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample `index`: "x" (C, D, H, W) float32, its "class", and "case", its number."""
        generator = np.random.default_rng([self.seed, index])
        case = int(generator.integers(len(self.volumes)))
        self.change.set_random_state(seed=int(generator.integers(2**31)))
        x = self.change({"x": self.volumes[case]})["x"].as_tensor().contiguous()
        return {"x": x, "class": torch.tensor(self.classes[case]), "case": torch.tensor(case)}


def _places_of_classes(labels: Tensor, generator: np.random.Generator) -> list[np.ndarray]:
    """For each class but the background that is there, some of its voxels, (n, 3)."""
    places = []
    for label in filter(None, labels.unique().tolist()):
        voxels = (labels == label).nonzero().numpy()
        if len(voxels) > SAMPLED:
            voxels = generator.choice(voxels, SAMPLED, replace=False, axis=0)
        places.append(voxels)
    return places


def _changes(settings: ChangeSection, keys: tuple[str, ...]) -> Compose:
    """The random changes of a sample; in space, of all its keys alike.

    The ranges of intensity are about nnU-Net's (Isensee et al. 2021).
    """
    angle, p = math.radians(settings.rotate), settings.appearance
    return Compose(
        [
            RandAffined(
                keys,
                prob=0.5 if settings.rotate or settings.scale else 0.0,
                rotate_range=(angle,) * 3,
                scale_range=(settings.scale,) * 3,
                mode=["bilinear" if key == "x" else "nearest" for key in keys],
                padding_mode="border",
            ),
            *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in settings.mirror_axes),
            RandGaussianNoised("x", prob=p, std=0.1),
            RandGaussianSmoothd("x", prob=p, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
            RandScaleIntensityd("x", prob=p, factors=0.25),
            RandAdjustContrastd("x", prob=p, gamma=(0.7, 1.5)),
        ]
    )
