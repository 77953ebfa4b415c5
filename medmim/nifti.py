"""Read NIfTI-1 and NIfTI-2 through nibabel."""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from medmim.errors import ScanError
from medmim.formats import NIFTI_SUFFIXES, check_claim, check_frames, one_line, times
from medmim.limits import DEFLATION

if TYPE_CHECKING:
    import nibabel as nib
    from nibabel.spatialimages import SpatialHeader, SpatialImage

TRAILING_BYTES = 1_000_000  # of an unpacked file behind its voxels, in which its end is looked for

NIFTI_UNITS, MM = 7, {1: 1e3, 3: 1e-3}  # bits of `xyzt_units` for space, and of metres and micrometres, how many mm


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The voxels (D, H, W) of a file in its index order, and its affine (4, 4) in RAS mm.

    Raises:
        ScanError: When it is no NIfTI, not whole, or more than one 3-D scan.
    """
    from nibabel.filebasedimages import ImageFileError
    from nibabel.fileholders import FileHolder
    from nibabel.spatialimages import HeaderDataError

    try:
        with _quiet(), _opened(path) as file:
            # No memory map: a file that is cut short while it is mapped kills the process.
            image = _nifti_class(path).from_file_map({"image": FileHolder(fileobj=file)}, mmap=False)
            check_frames(image.shape, path)
            content = path.stat().st_size * (1 if path.name.lower().endswith(".nii") else DEFLATION)
            room = max(content - int(image.dataobj.offset), 0) // image.get_data_dtype().itemsize
            check_claim(image.shape, room, path, "NIfTI")
            _check_header(image, file, path)
            scaled = (image.dataobj.slope, image.dataobj.inter) != (1.0, 0.0)
            if scaled and image.get_data_dtype().kind in "iuf":
                array = image.get_fdata(dtype=np.float32, caching="unchanged")
            else:
                array = np.asanyarray(image.dataobj)
            file.read(TRAILING_BYTES)  # gzip compares its checksum at the end, which is behind the last voxel
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
        if isinstance(error, ScanError):
            raise
        raise ScanError(f"{path}: cannot be read as NIfTI ({one_line(error)}); copy or export it again") from None
    # (D, H, W, 1, ...) -> (D, H, W)
    return array.reshape(array.shape[:3]) if array.ndim > 3 else array, affine_in_mm(image)


def nifti_header(path: Path) -> nib.Nifti1Header | None:
    """The header of a NIfTI file, without a look at its voxels; None for another file, or one that is broken."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    if not path.name.lower().endswith(NIFTI_SUFFIXES):
        return None
    try:
        with _quiet():
            return _nifti_class(path).from_filename(path).header
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError):
        return None


def affine_in_mm(image: SpatialImage) -> np.ndarray:
    """The affine of a nibabel image (4, 4); that of NIfTI is in the unit of its header, which nibabel passes over."""
    return _in_mm(image.affine, image.header)


def header_affine(header: nib.Nifti1Header) -> np.ndarray:
    """The affine that a NIfTI header gives its image, (4, 4) in mm."""
    return _in_mm(header.get_best_affine(), header)


def _in_mm(affine: np.ndarray, header: SpatialHeader) -> np.ndarray:
    import nibabel as nib

    if not isinstance(header, nib.Nifti1Header):
        return affine
    scale = MM.get(int(header["xyzt_units"]) & NIFTI_UNITS, 1.0)
    return np.diag([scale, scale, scale, 1.0]) @ affine


def _nifti_class(path: Path) -> type[nib.Nifti1Image]:
    """What reads the file: NIfTI-1 or 2, without extensions, which may be of any size once unpacked and are not used.

    nibabel's own choice would parse XML too, of files that say that they are CIFTI.
    """
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError
    from nibabel.nifti1 import Nifti1Extensions

    class NoExtensions(Nifti1Extensions):
        @classmethod
        def from_fileobj(cls, fileobj, size, byteswap):
            return cls()

    for image in (nib.Nifti1Image, nib.Nifti2Image):
        if image.path_maybe_image(path)[0]:
            header = type("Header", (image.header_class,), {"exts_klass": NoExtensions})
            return type("Image", (image,), {"header_class": header})
    raise ImageFileError("its header is neither that of NIfTI-1 nor of NIfTI-2")


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps nibabel from printing what it corrects, and numpy what overflows, which `Volume` refuses."""
    import nibabel as nib

    logger = nib.imageglobals.logger
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with np.errstate(over="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _check_header(image: nib.Nifti1Image, file: IO[bytes], path: Path) -> None:
    """Refuses what nibabel passes over on reading, or replaces: zero spacing by 1 mm, an unknown code by 0."""
    header = image.header
    if image.dataobj.offset < header.single_vox_offset:
        raise ScanError(f"{path}: its header says that voxels start inside of the header; copy or export it again")
    file.seek(0)
    stored = type(header).from_fileobj(file, check=False)
    for code in ("sform_code", "qform_code"):
        if stored[code] > 0 and header[code] == 0:
            raise ScanError(f"{path}: its {code} is {stored[code]}, which NIfTI does not have; correct the header")
    spacing = stored["pixdim"][1:4]
    # With an sform, the header's spacing is not used.
    if header["sform_code"] == 0 and not (np.isfinite(spacing) & (spacing != 0)).all():
        raise ScanError(f"{path}: voxel spacing {times(spacing)} mm is not usable; correct the header")
