"""Segment a scan of any size, in its own voxels, within bounded memory.

Legend: B windows, K classes, (D, H, W) voxels on the network's grid, "own" voxels are those of the scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map
from torch import Tensor

from medmim.errors import ScanError, SpecError
from medmim.files import atomic_write
from medmim.formats import times
from medmim.heads.segmenter import Segmenter
from medmim.identity import name_of, uncompiled
from medmim.inference import evaluating
from medmim.nifti import header_affine, nifti_header
from medmim.scans import same_place
from medmim.transforms import create_transform, label_type
from medmim.volumes import load_volume
from medmim.windows import cover, covering_grid, crop_window, in_batches, to_voxels

if TYPE_CHECKING:
    from medmim.scans import Scan
    from medmim.spec import VolumeSpec

GEOMETRY = (  # of a NIfTI header, beside the size of the voxels
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)

DESCRIPTION = 80  # bytes that the header has

BAND_BYTES = 1_000_000_000  # of scores kept at a time


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Which class each voxel of a scan has.

    Attributes:
        labels: (D, H, W) uint8, or int16 for more than 256 classes, in the scan's own voxels.
        affine: (4, 4), the scan's.
        classes: Names, by label; the first is the background.
        scan: The file that the scan came from, if any.
    """

    labels: np.ndarray
    affine: np.ndarray
    classes: tuple[str, ...]
    scan: Path | None = None

    @property
    def millilitres(self) -> dict[str, float]:
        """The volume of each class but the background."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        voxel = abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000
        return {name: int(count) * voxel for name, count in zip(self.classes[1:], counts[1:], strict=False)}

    def save(self, path: str | Path, *, model: str | None = None) -> None:
        """Writes the labels as NIfTI.

        NIfTI has two forms of the geometry, and programs differ in which they read. Of a scan in NIfTI both are taken
        over as they are, also where they differ; for any other scan both say the same.

        Args:
            path: The file to write.
            model: What made the labels, see `medmim.identity`; it is written into the header.

        Raises:
            OSError: When it cannot be written; nothing is there then.
        """
        image = nib.Nifti1Image(self.labels, self.affine)
        theirs = nifti_header(self.scan) if self.scan is not None else None
        if theirs is not None and np.allclose(header_affine(theirs), self.affine):
            header = nib.Nifti1Header()
            header.set_data_dtype(self.labels.dtype)
            for field in GEOMETRY:
                header[field] = theirs[field]
            header["pixdim"][:4] = theirs["pixdim"][:4]
            image = nib.Nifti1Image(self.labels, None, header)
        else:
            image.set_sform(self.affine, code="scanner")
            image.set_qform(self.affine, code="scanner")  # without the shear of a tilted gantry: it cannot express that
        image.header["descrip"] = _description(model)
        with atomic_write(path) as temporary:
            image.to_filename(temporary)


def read_segmentation(
    path: str | Path, classes: tuple[str, ...], *, scan: Path | None = None, model: str | None = None
) -> Segmentation:
    """What `Segmentation.save` wrote.

    Args:
        path: The file.
        classes: Names, by label.
        scan: The scan that it must be of, as far as that is quick to see.
        model: What must have made it, see `Segmentation.save`.

    Raises:
        ScanError: For a file that cannot be read, has other labels than there are classes, does not lie on the scan, or
            is not of the model.
    """
    cure = "delete it, and segment the scan again"
    try:
        volume = load_volume(path)
    except ScanError as error:
        raise ScanError(f"{error}, or {cure}") from None
    labels = volume.array[0]
    theirs = nifti_header(scan) if scan is not None else None
    if theirs is not None and labels.shape != theirs.get_data_shape()[:3]:
        raise ScanError(
            f"{path}: has {times(labels.shape)} voxels, and the scan {times(theirs.get_data_shape()[:3])}; {cure}"
        )
    if theirs is not None and not same_place(volume.affine, header_affine(theirs), volume.array.shape[1:]):
        raise ScanError(f"{path}: lies elsewhere than the scan; {cure}")
    if labels.min() < 0 or labels.max() >= len(classes) or (labels.dtype.kind == "f" and (labels % 1).any()):
        raise ScanError(f"{path}: its values are not the labels 0 to {len(classes) - 1} of a mask; {cure}")
    if model is not None and nifti_header(Path(path))["descrip"].item() != _description(model):
        raise ScanError(f"{path}: does not say that it is of {model}; choose another output, or {cure}")
    if labels.dtype.kind != "u":  # other programs save labels as floats too
        labels = labels.astype(np.int16)
    return Segmentation(labels, volume.affine, classes, scan)


def _description(model: str | None) -> bytes:
    """What the field of a NIfTI header for that says of a mask; of a long name the end, which has the digest."""
    return f"medmim {model or ''}".strip().encode("ascii", "replace")[-DESCRIPTION:]


def segment(
    model: Segmenter,
    scan: Scan,
    *,
    modality: str | None = None,
    volume: VolumeSpec | None = None,
    overlap: float = 0.5,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Segmentation:
    """Prepares a scan as the model expects it, labels all of it, and brings the labels back to the scan's voxels.

    Args:
        model: From `create_segmenter` or `from_pretrained`.
        scan: As for `create_transform`.
        modality: "CT", "MR" or "PET"; None takes it from the scan.
        volume: Preprocessing for a model whose spec has none.
        overlap: Share of a window that the next one covers again, 0 to below 1.
        batch_size: Windows at a time.
        progress: Called with windows done and windows in all.

    Raises:
        ScanError: When the scan cannot be used; the message starts with its path.
        SpecError: When the model does not segment, nothing says how to prepare the scan, or the modality is not
            covered.
    """
    classes = segmented_classes(model)
    transform = create_transform(model, modality=modality, fit="pad", volume=volume)
    x = transform(scan)
    labels = predict_labels(model, x.as_tensor(), overlap=overlap, batch_size=batch_size, progress=progress)
    labels, path = MetaTensor(labels[None], meta=x.meta), x.meta["filename_or_obj"]  # x.meta has the affine too
    del x  # the largest array here
    own = transform.inverse(labels, labels=True)
    return Segmentation(own[0].numpy(), own.affine.numpy(), classes, Path(path))


def segmented_classes(model: Segmenter) -> tuple[str, ...]:
    """The names of a segmenter's classes.

    Raises:
        SpecError: For a model that is none.
    """
    if not isinstance(uncompiled(model), Segmenter):
        raise SpecError(f"{name_of(model)} does not segment; `medmim-train finetune` makes a model that does")
    return model.spec.task.classes


@torch.inference_mode()
def predict_labels(
    model: Segmenter,
    x: Tensor,
    *,
    overlap: float = 0.5,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    band_bytes: int = BAND_BYTES,
) -> Tensor:
    """Labels a volume of any size window by window (`medmim.windows`).

    Scores of overlapping windows are added with Gaussian weights, because voxels at the rim of a window saw less around
    them; the class with the highest sum wins. Scores are kept for a band of a window's depth, which moves along D:
    slices that no window will reach again are labelled and dropped. Where a band over the whole of H is too large, as
    with many classes, it goes through strips of H one after the other, and windows at a seam are computed twice.

    Args:
        model: To (B, K, *img_size) from (B, channels, *img_size). It runs in evaluation mode, on the device it is on.
        x: (channels, D, H, W) in network units.
        overlap: Share of a window that the next one covers again, 0 to below 1.
        batch_size: Windows at a time.
        progress: Called with windows done and windows in all.
        band_bytes: How large a band of scores may be; at least a window's height is taken.

    Returns:
        (D, H, W) uint8, or int16 for more than 256 classes, on the CPU; the same whatever `band_bytes` is.

    Raises:
        ValueError: For an overlap outside [0, 1), or a batch of no windows.
    """
    depth, height, width = x.shape[1:]
    labels = torch.zeros(depth, height, width, dtype=label_type(model.num_classes))
    grid_size = covering_grid(x.shape[1:], model.patch_size, model.grid_size)
    windows = list(cover(grid_size, model.grid_size, overlap=overlap))
    row_bytes = 4 * model.num_classes * model.img_size[0] * width
    rows = max(band_bytes // row_bytes, model.img_size[1])
    jobs = [
        (strip, [window for window in windows if _reaches(to_voxels(window, model.patch_size)[1], strip)])
        for strip in (slice(start, min(start + rows, height)) for start in range(0, height, rows))
    ]
    done, total = 0, sum(len(inside) for _, inside in jobs)
    weight = compute_importance_map(model.img_size, mode="gaussian")
    fill, parameter = float(x.min()), next(model.parameters())
    with evaluating(model):
        for strip, inside in jobs:
            band = _Band(labels, strip, num_classes=model.num_classes, depth=model.img_size[0])
            for batch in in_batches(inside, batch_size):
                crops = torch.stack([crop_window(x, window, model.patch_size, fill=fill) for window in batch])
                scores = model(crops.to(parameter)).float().cpu()  # (B, K, *img_size)
                for window, part in zip(batch, scores, strict=True):
                    band.add(to_voxels(window, model.patch_size), part.mul_(weight))
                done += len(batch)
                if progress:
                    progress(done, total)
            band.finish()
    return labels


class _Band:
    """Sums of scores (K, depth, rows, W) over the slices from `first` on, of a strip of H.

    Args:
        labels: (D, H, W), where what is settled is written.
        strip: Rows of H.
        num_classes: K.
        depth: Slices that a window has.
    """

    def __init__(self, labels: Tensor, strip: slice, *, num_classes: int, depth: int) -> None:
        self.labels, self.strip, self.first = labels, strip, 0
        self.sums = torch.zeros(num_classes, depth, strip.stop - strip.start, labels.shape[2])

    def add(self, voxels: tuple[slice, slice, slice], scores: Tensor) -> None:
        """Adds the scores (K, d, h, w) of a window, which starts no earlier along D than those before it."""
        d, h, w = voxels
        if d.start > self.first:
            self._settle(d.start - self.first)
        # What of the window lies in the strip and inside of the volume.
        low, high = max(h.start, self.strip.start), min(h.stop, self.strip.stop)
        stop = min(w.stop, self.labels.shape[2])
        self.sums[:, :, low - self.strip.start : high - self.strip.start, w.start : stop] += scores[
            :, :, low - h.start : high - h.start, : stop - w.start
        ]

    def finish(self) -> None:
        """Labels the slices that are left."""
        self._settle(len(self.labels) - self.first)

    def _settle(self, slices: int) -> None:
        """Labels the first slices and moves on by as many."""
        settled = self.labels[self.first : self.first + slices, self.strip]
        # Slice by slice, because max makes integers of eight bytes; argmax takes five times as long.
        for i, plane in enumerate(settled):
            plane.copy_(self.sums[:, i].max(dim=0).indices)
        self.sums = self.sums.roll(-slices, dims=1)
        self.sums[:, self.sums.shape[1] - slices :] = 0
        self.first += slices


def _reaches(side: slice, strip: slice) -> bool:
    return side.start < strip.stop and side.stop > strip.start
