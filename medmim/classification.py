"""The class probabilities of a scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from medmim.errors import SpecError
from medmim.heads.segmenter import Segmenter
from medmim.identity import name_of, uncompiled
from medmim.inference import evaluating
from medmim.transforms import create_transform

if TYPE_CHECKING:
    from medmim.scans import Scan
    from medmim.spec import VolumeSpec


@torch.inference_mode()
def classify(
    model: nn.Module,
    scan: Scan,
    *,
    modality: str | None = None,
    volume: VolumeSpec | None = None,
) -> dict[str, float]:
    """Prepares a scan as the model expects it, cropped or padded around its middle, and classifies it.

    Args:
        model: A model with a classifier; it runs in evaluation mode, on the device it is on.
        scan: As for `create_transform`.
        modality: "CT", "MR" or "PET"; None takes it from the scan.
        volume: Preprocessing for a model whose spec has none.

    Returns:
        The probability of each class, by its name.

    Raises:
        ScanError: When the scan cannot be used; the message starts with its path.
        SpecError: When the model has no classifier of two classes or more, nothing says how to prepare the scan, or the
            modality is not covered.
    """
    classes = classified_classes(model)
    x = create_transform(model, modality=modality, volume=volume)(scan).as_tensor()
    with evaluating(model):
        scores = model(x[None].to(next(model.parameters())))  # (1, K)
    return dict(zip(classes, scores[0].float().softmax(dim=0).tolist(), strict=True))


def classified_classes(model: nn.Module) -> tuple[str, ...]:
    """The names of a classifier's classes: "class 0", ... where the model's spec has none.

    Raises:
        SpecError: For a model that has no classifier, or one of a single output or of others than its task names.
    """
    name, spec = name_of(model), getattr(model, "spec", None)
    if isinstance(uncompiled(model), Segmenter) or not getattr(model, "num_classes", 0):
        raise SpecError(f"{name} does not classify; `medmim-train finetune` makes a model that does")
    if model.num_classes == 1:
        raise SpecError(f"{name} has a single output, of which softmax makes 1 for any scan; use two classes or more")
    if spec is not None and spec.task is not None:
        if len(classes := spec.task.classes) != model.num_classes:
            raise SpecError(f"{name} has {model.num_classes} outputs, its task names {len(classes)}; use name_classes")
        return classes
    return tuple(f"class {i}" for i in range(model.num_classes))
