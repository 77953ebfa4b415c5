"""The demo: what medmim does, on the sample scans, with the weights that ship."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from medmim.factory import create_decoder, create_model
from medmim.inference import embed, save_embeddings
from medmim.pictures import reconstruction_picture
from medmim.reconstruction import compare, reconstruct_scan
from medmim.samples import sample_scans

SEED = 0


@dataclass(frozen=True)
class DemoScan:
    """What came of one scan.

    Attributes:
        name: Of the sample scan.
        picture: PNG of its reconstruction.
        errors: See `medmim.reconstruction.compare`.
    """

    name: str
    picture: Path
    errors: Mapping[str, float]


@dataclass(frozen=True)
class DemoResult:
    """What the demo wrote: a picture of each scan, and one file with the features of all."""

    scans: tuple[DemoScan, ...]
    features: Path


def run_demo(
    folder: Path, *, model: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> DemoResult:
    """Reconstructs the sample scans from 25 % of their patches and embeds them.

    Args:
        folder: Where to write.
        model: A name that `create_model` knows, with weights and their decoder.
        progress: Called with scans done and scans in all.

    Raises:
        WeightsError: When there are no such weights, or they have no decoder.
    """
    encoder = create_model(model, pretrained=True)
    decoder = create_decoder(encoder)
    orientation = encoder.spec.weights.volume.orientation
    samples, scans, embeddings = sample_scans(), [], {}
    for done, sample in enumerate(samples, start=1):
        result, spacing = reconstruct_scan(
            encoder,
            decoder,
            sample.path,
            modality=sample.modality,
            ratio=0.75,
            generator=torch.Generator().manual_seed(SEED),
        )
        picture = folder / f"{sample.name}.png"
        reconstruction_picture(result, picture, spacing=spacing, orientation=orientation, title=sample.name)
        scans.append(DemoScan(sample.name, picture, compare(result)))
        embeddings[sample.name] = embed(encoder, sample.path, modality=sample.modality)
        progress(done, len(samples))
    features = folder / "features.safetensors"
    save_embeddings(features, embeddings)
    return DemoResult(tuple(scans), features)
