"""Segment a scan of any size, in its own voxels, and write and read the mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from monai.data import MetaTensor

from medmim.errors import ScanError, SpecError
from medmim.files import atomic_write
from medmim.formats import times
from medmim.heads.segmenter import Segmenter
from medmim.identity import name_of, uncompiled
from medmim.labelling import predict_labels
from medmim.nifti import header_affine, nifti_header
from medmim.resampling import find_places
from medmim.scans import same_place
from medmim.transforms import create_transform
from medmim.volumes import load_volume

if TYPE_CHECKING:
    from medmim.scans import Scan
    from medmim.spec import VolumeSpec

GEOMETRY = (  # of a NIfTI header, beside the size of the voxels
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)

DESCRIPTION = 80  # bytes that the header has


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
    """Prepares a scan as the model expects it and labels all of its own voxels.

    Where the network's voxels are larger or smaller than the scan's, scores are interpolated, not labels, so that a
    border runs between voxels where the network puts it. Only slices of a tilted gantry take the nearest label.

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
    affine, shape = x.meta["original_affine"], x.meta["original_shape"]
    places = find_places(x.affine, affine, shape)
    labels = predict_labels(
        model,
        x.as_tensor(),
        places=places and places.by_source,
        overlap=overlap,
        batch_size=batch_size,
        progress=progress,
    )
    if places is None:  # the slices of a tilted gantry, which the grid straightened
        labels = transform.inverse(MetaTensor(labels[None], meta=x.meta), labels=True)[0].as_tensor()
    else:
        labels = labels.permute(places.axes)
    return Segmentation(labels.numpy(), affine.numpy(), classes, Path(x.meta["filename_or_obj"]))


def segmented_classes(model: Segmenter) -> tuple[str, ...]:
    """The names of a segmenter's classes.

    Raises:
        SpecError: For a model that is none.
    """
    if not isinstance(uncompiled(model), Segmenter):
        raise SpecError(f"{name_of(model)} does not segment; `medmim-train finetune` makes a model that does")
    return model.spec.task.classes
