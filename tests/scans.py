"""A scan whose every voxel tells where it is, and ways to write it."""

import nibabel as nib
import numpy as np
import SimpleITK as sitk

SHAPE = (14, 9, 6)
SPACING = (0.8, 1.5, 3.0)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def rotated_affine() -> np.ndarray:
    """Index to RAS mm: 12 degrees about S, the first axis runs to the Left, the second to Posterior."""
    angle = np.deg2rad(12)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-1, -1, 1]) * SPACING
    affine[:3, 3] = (11, -7, 40)
    return affine


def voxels(shape=SHAPE) -> np.ndarray:
    """Every voxel has its own value, so that a wrong axis order cannot go unnoticed."""
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def itk_image(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose()))
    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def write_dicom(
    folder, array, affine, *, uid="1.2.3.4", modality="CT", description="chest", skip=(), tilt=0.0, slopes=None
):
    """One file a slice, named against the order of the slices.

    `tilt` shifts each slice along the rows by so many mm; with `slopes`, slice k holds array * slopes[k].
    """
    folder.mkdir(exist_ok=True)
    image = itk_image(array, affine)
    direction = np.reshape(image.GetDirection(), (3, 3))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in set(range(array.shape[2])) - set(skip):
        piece = image[:, :, k]
        position = np.array(image.TransformIndexToPhysicalPoint((0, 0, k))) + tilt * k * direction[:, 0]
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{k + 1}",
            "0008|0060": modality,
            "0008|103e": description,
            "0020|000d": "1.2.3",
            "0020|000e": uid,
            "0020|0032": "\\".join(f"{value:.6f}" for value in position),
            "0020|0037": "\\".join(f"{value:.6f}" for value in direction[:, :2].T.ravel()),
        }
        if slopes:
            tags |= {"0028|1052": "0", "0028|1053": str(slopes[k])}
            tags |= {"0028|0100": "16", "0028|0101": "16", "0028|0102": "15", "0028|0103": "1"}
            piece = sitk.Cast(piece, sitk.sitkFloat64) * slopes[k] if slopes[k] != 1 else piece
        for key, value in tags.items():
            piece.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid}-{99 - k}.dcm"))
        writer.Execute(piece)
    return folder


def save_nifti(path, array, affine=None, **header):
    image = nib.Nifti1Image(array, rotated_affine() if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path
