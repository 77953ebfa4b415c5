"""Features of a whole scan of any size, from windows of the size that an encoder takes.

Legend: B windows, C features, (D, H, W) voxels, (Dg, Hg, Wg) token grid of the scan, N tokens of a window, P prefix
tokens. A token is one position of the encoder's last map: a patch of a plain transformer, and what the strides make of
the voxels in an encoder with a pyramid of maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map
from torch import Tensor, nn

from medmim.errors import ScanError, SpecError, printable
from medmim.files import atomic_write
from medmim.heads.segmenter import Segmenter
from medmim.identity import name_of, uncompiled
from medmim.layers.tokens import Size
from medmim.transforms import create_transform
from medmim.windows import cover, covering_grid, crop_window, in_batches

if TYPE_CHECKING:
    from medmim.scans import Scan
    from medmim.spec import VolumeSpec

PARTS = ("features", "pooled", "affine")  # of an embedding, in a file
FOREGROUND = 0.05  # of the range of the scaled scan: about 100 HU above air in a window of -1000 to 1000


@dataclass(frozen=True, eq=False)
class Embedding:
    """What an encoder makes of one scan.

    Attributes:
        features: (C, Dg, Hg, Wg) float32 on the CPU, one vector a token, the whole scan.
        pooled: (C,), their mean over the tokens that hold foreground.
        affine: (4, 4) float64, index in `features` to mm in the scan's RAS space (centre of the token's voxels).
        model: Name of the model and its weights.
        scan: Path of the scan; "this volume" when it came from no file.
    """

    features: Tensor
    pooled: Tensor
    affine: Tensor
    model: str
    scan: str


def embed(
    model: nn.Module,
    scan: Scan,
    *,
    modality: str | None = None,
    volume: VolumeSpec | None = None,
    overlap: float = 0.25,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Embedding:
    """Prepares a scan as the weights expect it and encodes all of it.

    Args:
        model: Any encoder as `dense_features` takes, with `spec`; of a segmenter, its encoder is used.
        scan: As for `create_transform`.
        modality: "CT", "MR" or "PET"; None takes it from the scan.
        volume: Preprocessing for a model without weights.
        overlap: Share of a window that the next one covers again, 0 to below 1.
        batch_size: Windows encoded at a time.
        progress: Called with windows done and windows in all.

    Returns:
        Dense features, their pooled vector and where they lie in the patient.

    Raises:
        ScanError: When the scan cannot be used; the message starts with its path.
        SpecError: When nothing says how to prepare it, the modality is not covered, or the model's input size is no
            multiple of the stride of its last map.
    """
    x = create_transform(model, modality=modality, fit="pad", volume=volume)(scan)  # (channels, D, H, W)
    voxels = x.as_tensor()
    features = dense_features(model, voxels, overlap=overlap, batch_size=batch_size, progress=progress)
    stride, _ = last_map(model)
    share = foreground_patches(voxels, stride).flatten().float()  # (Dg * Hg * Wg,)
    pooled = features.flatten(1) @ (share / share.sum())  # a product, where indexing would copy the feature map
    affine = x.affine @ _token_to_voxel(stride)
    return Embedding(features, pooled, affine, name_of(model), x.meta["filename_or_obj"])


# no_grad, because what inference_mode returns could not be used to train a probe on it.
@torch.no_grad()
def dense_features(
    model: nn.Module,
    x: Tensor,
    *,
    overlap: float = 0.25,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Encodes a volume of any size window by window.

    Tokens of overlapping windows (see `medmim.windows`) are averaged with Gaussian weights, because tokens at the rim
    of a window saw less around them. Where the volume ends inside a patch or is smaller than a window, its smallest
    value is filled in at the end. There is one feature map, which the windows are added to.

    Args:
        model: Has `img_size`, `patch_size` or `feature_info`, `num_features`, `num_prefix_tokens`, and
            `forward_features` from (B, channels, *img_size) to tokens (B, P + N, C) or to a map (B, C, *grid of a
            window); or a segmenter, whose encoder is used. It runs in evaluation mode, on the device it is on.
        x: (channels, D, H, W) in network units.
        overlap: Share of a window that the next one covers again, 0 to below 1.
        batch_size: Windows encoded at a time.
        progress: Called with windows done and windows in all.

    Returns:
        (C, Dg, Hg, Wg) float32 on the CPU; a side of the grid is that of the volume over the stride of the encoder's
        last map, rounded up, and at least the window's.

    Raises:
        ValueError: For an overlap outside [0, 1), or a batch of no windows.
        SpecError: When the model's input size is no multiple of the stride of its last map.
    """
    model = _encoder(model)
    stride, window_grid = last_map(model)
    grid_size = covering_grid(x.shape[1:], stride, window_grid)
    weight = compute_importance_map(window_grid, mode="gaussian")  # (Dg, Hg, Wg) of a window
    features = torch.zeros(model.num_features, *grid_size)
    total = torch.zeros(grid_size)
    fill, parameter = float(x.min()), next(model.parameters())
    windows = list(cover(grid_size, window_grid, overlap=overlap))
    with evaluating(model):
        done = 0
        for batch in in_batches(windows, batch_size):
            crops = torch.stack([crop_window(x, window, stride, fill=fill) for window in batch])
            maps = model.forward_features(crops.to(parameter)).float().cpu()
            if maps.ndim == 3:  # tokens (B, P + N, C)
                maps = maps[:, model.num_prefix_tokens :].mT.unflatten(2, window_grid)
            for window, part in zip(batch, maps, strict=True):  # (C, Dg, Hg, Wg) of a window
                features[:, *window] += part * weight
                total[window] += weight
            done += len(batch)
            if progress:
                progress(done, len(windows))
    return features.div_(total)


def last_map(model: nn.Module) -> tuple[Size, Size]:
    """The stride of an encoder's last map, in voxels along (D, H, W), and its grid for one input.

    The patch size would not do: that of a Swin transformer is the stride of its finest map.

    Args:
        model: As for `dense_features`.

    Raises:
        SpecError: When the input size is no multiple of the stride; the last row of the map is then padding in part.
    """
    encoder = _encoder(model)
    info = getattr(encoder, "feature_info", None)
    stride = tuple(info[-1]["reduction"]) if info else tuple(encoder.patch_size)
    if any(side % step for side, step in zip(encoder.img_size, stride, strict=True)):
        raise SpecError(
            f"img_size {tuple(encoder.img_size)} is no multiple of {stride}, the stride of the encoder's last map; "
            "change it with img_size= at creation or set_input_size"
        )
    depth, height, width = (side // step for side, step in zip(encoder.img_size, stride, strict=True))
    return stride, (depth, height, width)


def foreground_patches(x: Tensor, patch_size: Size) -> Tensor:
    """Which patches hold more than air or padding: those whose mean is 5 % of the range above the minimum.

    Args:
        x: (channels, D, H, W) in network units.
        patch_size: Voxels along (D, H, W).

    Returns:
        (Dg, Hg, Wg) boolean; all True when no patch stands out, as in a constant volume.
    """
    means = F.avg_pool3d(x[None], patch_size, ceil_mode=True)[0].mean(dim=0)  # (Dg, Hg, Wg)
    low, high = float(x.min()), float(x.max())
    inside = means > low + FOREGROUND * (high - low)
    # Means are rounded, so in a constant volume some are above it.
    return inside if low < high and inside.any() else torch.ones_like(inside)


def save_embeddings(path: str | Path, embeddings: Mapping[str, Embedding]) -> None:
    """Writes embeddings as one safetensors file, with the tensors `NAME/features`, `NAME/pooled` and `NAME/affine`.

    Args:
        path: The file to write; it appears whole or not at all. Its metadata has `model`, and `NAME/scan`, the path.
        embeddings: By name, all of the same model.

    Raises:
        OSError: When it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors, metadata = {}, {}
    for name, embedding in embeddings.items():
        tensors |= {f"{name}/{part}": getattr(embedding, part) for part in PARTS}
        metadata |= {"model": embedding.model, f"{name}/scan": printable(embedding.scan)}
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"{path}: {error}") from None


def read_embeddings(path: Path, *, scans: Mapping[str, str], model: str) -> dict[str, Embedding]:
    """What `save_embeddings` wrote of some scans.

    Args:
        path: The file; one that is not there or not whole has none.
        scans: What each embedding must say that it is of, by name.
        model: Likewise, of all.

    Returns:
        By name those that are there.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            there = {name: scan for name, scan in scans.items() if metadata.get(f"{name}/scan") == scan}
            return {
                name: Embedding(*(file.get_tensor(f"{name}/{part}").clone() for part in PARTS), model, scan)
                for name, scan in (there if metadata.get("model") == model else {}).items()
            }
    except (SafetensorError, OSError):
        return {}


def check_embeddings(path: Path, *, name: str, scan: str, model: str) -> None:
    """Refuses a file that is not of `save_embeddings`, or of another model or scan.

    Args:
        path: The file.
        name: Of the embedding that it must have.
        scan: What that must say that it is of.
        model: Likewise.

    Raises:
        ScanError: Saying so.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ScanError(
            f"{path}: not a whole safetensors file ({error}); delete it, and embed the scan again"
        ) from None
    if (theirs := metadata.get("model")) != model:
        raise ScanError(f"{path}: is of {theirs or 'an unknown model'}, not of {model}; choose another output")
    if (theirs := metadata.get(f"{name}/scan")) != scan:
        raise ScanError(
            f"{path}: is of {theirs or 'an unknown scan'}, not of {scan}; choose another output, or where the scan was "
            "moved, delete the file"
        )


def _encoder(model: nn.Module) -> nn.Module:
    model = uncompiled(model)
    return model.encoder if isinstance(model, Segmenter) else model


def _token_to_voxel(stride: Size) -> Tensor:
    """Affine from token index to the voxel index of the centre of its voxels: (4, 4) float64."""
    matrix = torch.eye(4, dtype=torch.float64)
    for axis, step in enumerate(stride):
        matrix[axis, axis] = step
        matrix[axis, 3] = (step - 1) / 2
    return matrix


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to exactly what each module was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
