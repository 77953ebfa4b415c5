"""Read a scan with its geometry: NIfTI, NRRD, MetaImage (MHA/MHD) or a DICOM series.

Whatever the file format, a `Volume` has its axes in the file's index order and an affine from voxel index to
millimetres in RAS space (x to the patient's Right, y to Anterior, z to Superior: the convention of NIfTI and nibabel;
DICOM and ITK use LPS and are converted). Everything that cannot be used as one 3-D scan is refused with a `ScanError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmim.dicom import dicom_files, read_dicom, series_files
from medmim.errors import ScanError
from medmim.formats import DICOM_SUFFIX, ITK_SUFFIXES, NIFTI_SUFFIXES, times
from medmim.itk import itk_files, read_itk
from medmim.nifti import read_nifti

SPACING = 1e-6, 1e6  # mm; a header with less or more in it is broken, and numbers computed from it would overflow

FLOAT32_MAX = float(np.finfo(np.float32).max)  # what networks compute in


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan and where it lies, checked on creation.

    Attributes:
        array: (C, D, H, W) real finite numbers in the file's index order and stored type, in the units of the scan.
        affine: (4, 4) float64, voxel index to mm in RAS space.
        path: The file or folder it came from.
        modality: "CT", "MR", "PET" or what else the header says (DICOM's does); None where it says nothing.
    """

    array: np.ndarray
    affine: np.ndarray
    path: Path | None = None
    modality: str | None = None

    def __post_init__(self):
        _check_array(self.array, self.name)
        _check_affine(self.affine, self.name)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along D, H, W."""
        return tuple(float(size) for size in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def orientation(self) -> str:
        """Axis codes of D, H, W, for example "LPS": the direction in which each index grows."""
        import nibabel as nib

        return "".join(nib.aff2axcodes(self.affine))

    @property
    def name(self) -> str:
        """The path, or a stand-in for messages about a volume that came from no file."""
        return str(self.path) if self.path else "this volume"


def load_volume(path: str | Path) -> Volume:
    """Reads one 3-D scan.

    Args:
        path: A .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd file; the folder of a DICOM series; or one .dcm file, which
            stands for the whole series that it belongs to in its folder.

    Returns:
        The scan with one channel, as stored; NIfTI scale factors and DICOM rescaling are applied.

    Raises:
        ScanError: One sentence that starts with the path and says what to do.
    """
    path = Path(path)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name that is too long
        raise ScanError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    modality = None
    if is_folder:
        array, affine, modality = read_dicom(path)
    elif not is_file:
        raise ScanError(f"{path}: no such file or folder; check the path")
    elif path.stat().st_size == 0:
        raise ScanError(f"{path}: the file is empty; copy or export it again")
    elif path.name.lower().endswith(NIFTI_SUFFIXES):
        array, affine = read_nifti(path)
    elif path.name.lower().endswith(ITK_SUFFIXES):
        array, affine = read_itk(path)
    elif path.name.lower().endswith(DICOM_SUFFIX):
        array, affine, modality = read_dicom(path)
    else:
        known = ", ".join((*NIFTI_SUFFIXES, *ITK_SUFFIXES, DICOM_SUFFIX))
        raise ScanError(f"{path}: not a known scan format; give a file that ends in {known}, or a DICOM folder")
    return Volume(array[None], affine, path, modality)


def scan_files(path: Path) -> list[Path]:
    """The files that the scan at `path` is in: one, a header and its voxels, or those of a DICOM series.

    Raises:
        ScanError: When it cannot be told which.
        OSError: When they may not be looked at.
    """
    if path.is_dir():
        return dicom_files(path)
    if not path.is_file():
        return []
    if path.name.lower().endswith(ITK_SUFFIXES):
        return itk_files(path)
    return series_files(path) if path.name.lower().endswith(DICOM_SUFFIX) else [path]


def _check_array(array: np.ndarray, name: str) -> None:
    if array.ndim != 4:
        raise ScanError(
            f"{name}: has {array.ndim - 1} axes beside the channels (shape {times(array.shape)}); give a 3-D scan"
        )
    if min(array.shape[1:]) < 2:
        raise ScanError(f"{name}: a single slice (shape {times(array.shape[1:])}); give a scan with 2 slices or more")
    if array.dtype.kind == "c":
        raise ScanError(f"{name}: holds complex numbers ({array.dtype}); save the magnitude as a new file")
    if array.dtype.kind not in "iufb":
        raise ScanError(f"{name}: holds colours or records ({array.dtype}), not one value a voxel; convert it to grey")
    # Smallest and largest are NaN where a voxel is, and need no array of booleans.
    if array.dtype.kind == "f" and not (float(array.min()) >= -FLOAT32_MAX and float(array.max()) <= FLOAT32_MAX):
        with np.errstate(over="ignore"):
            broken = array.size - np.count_nonzero(np.isfinite(array.astype(np.float32)))
        raise ScanError(
            f"{name}: {broken} of {array.size} voxels are NaN or infinite in float32; replace them, for example by "
            "the background value, and save the scan again"
        )


def _check_affine(affine: np.ndarray, name: str) -> None:
    if affine.shape != (4, 4):
        raise ScanError(f"{name}: the affine is {times(affine.shape)}; give (4, 4), voxel index to mm")
    with np.errstate(all="ignore"):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not ((spacing >= SPACING[0]) & (spacing <= SPACING[1])).all():
        raise ScanError(f"{name}: voxel spacing {times(spacing)} mm is not usable; correct the header")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise ScanError(f"{name}: the affine is singular (two axes point the same way); correct the header")
