"""Read a scan with its geometry: NIfTI, NRRD, MetaImage (MHA/MHD) or a DICOM series.

Whatever the file format, a `Volume` has its axes in the file's index order and an affine from voxel index to
millimetres in RAS space (x to the patient's Right, y to Anterior, z to Superior: the convention of NIfTI and nibabel;
DICOM and ITK use LPS and are converted). Everything that cannot be used as one 3-D scan is refused with a `ScanError`.
"""

from __future__ import annotations

import logging
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medmim.errors import ScanError
from medmim.limits import DEFLATION, VOXELS

if TYPE_CHECKING:
    import nibabel as nib
    import SimpleITK as sitk
    from nibabel.spatialimages import SpatialHeader, SpatialImage

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
SCAN_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES)
DICOM_SUFFIX = ".dcm"
DICOM_PREAMBLE, DICOM_MAGIC = 128, b"DICM"  # bytes before it, and what tells a DICOM file of any name
LOOKS = 5  # files of other names in a folder that are opened to see whether they are slices

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

NIFTI_UNITS, MM = 7, {1: 1e3, 3: 1e-3}  # bits of `xyzt_units` for space, and of metres and micrometres, how many mm

SPACING = 1e-6, 1e6  # mm; a header with less or more in it is broken, and numbers computed from it would overflow

FLOAT32_MAX = float(np.finfo(np.float32).max)  # what networks compute in

HEADER_BYTES = 1_000_000  # of NRRD and MetaImage, in which they may name another file
NRRD_FIELD = 500  # characters of a field in its header; three vectors in full precision have 230


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
    from medmim.dicom import read_dicom

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
        array, affine = _read_nifti(path)
    elif path.name.lower().endswith(ITK_SUFFIXES):
        array, affine = _read_itk(path)
    elif path.name.lower().endswith(DICOM_SUFFIX):
        array, affine, modality = read_dicom(path)
    else:
        known = ", ".join((*NIFTI_SUFFIXES, *ITK_SUFFIXES, DICOM_SUFFIX))
        raise ScanError(f"{path}: not a known scan format; give a file that ends in {known}, or a DICOM folder")
    return Volume(array[None], affine, path, modality)


def nifti_header(path: Path) -> nib.Nifti1Header | None:
    """The header of a NIfTI file, without a look at its voxels; None for another file, or one that is broken."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    if not path.name.lower().endswith(NIFTI_SUFFIXES):
        return None
    try:
        return _nifti_class(path).from_filename(path).header
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError):
        return None


def find_scans(folder: str | Path) -> list[Path]:
    """Scans at any depth below a folder, sorted: files by their suffix, and folders of DICOM slices.

    Slices end in `.dcm`, or are known by what a file starts with. Names that start with a dot are passed over: macOS
    puts such a file beside each scan on a disk of another system. Links to folders are followed, into each folder once.
    """
    found: list[Path] = []
    unlisted: list[OSError] = []
    for parent, names in _walk(Path(folder), unlisted):
        files = [parent / name for name in sorted(names) if not name.startswith(".")]
        found += [path for path in files if path.name.lower().endswith(SCAN_SUFFIXES) and _is_file_or_lost(path)]
        if _holds_slices([path for path in files if not path.name.lower().endswith(SCAN_SUFFIXES)]):
            found.append(parent)
    # What reads a folder that may not be listed says so.
    return sorted(found + [Path(error.filename) for error in unlisted if isinstance(error, PermissionError)])


def _walk(folder: Path, unlisted: list[OSError]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder at or below another, and the names in it; linked ones last, so that all have their own path first."""
    todo, seen = [folder], set()
    while todo:
        for parent, folders, names in os.walk(todo.pop(0), onerror=unlisted.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            place = os.path.realpath(parent)
            if place in seen:  # by a link, which may lead up
                folders.clear()
                continue
            seen.add(place)
            todo += [path for name in folders if (path := Path(parent, name)).is_symlink()]
            yield Path(parent), names


def _holds_slices(files: list[Path]) -> bool:
    """Whether DICOM slices are among the files of a folder, which have no suffix of another scan."""
    if any(path.name.lower().endswith(DICOM_SUFFIX) and _is_file_or_lost(path) for path in files):
        return True
    # An index, which starts as slices do, may stand in a folder that has none.
    files = [path for path in files if path.name.upper() != "DICOMDIR"]
    looks = min(LOOKS, len(files))
    # From all over the list, so that notes beside the slices do not decide.
    return any(_starts_as_dicom(files[i * len(files) // looks]) for i in range(looks))


def _is_file_or_lost(path: Path) -> bool:
    """Whether a name stands for a file, or for a link to one that is not there: what reads that says so."""
    return path.is_file() or not path.exists()


def _starts_as_dicom(path: Path) -> bool:
    try:
        if not path.is_file():  # to open a pipe would wait for its other end
            return False
        with open(path, "rb") as file:
            return file.read(DICOM_PREAMBLE + len(DICOM_MAGIC))[DICOM_PREAMBLE:] == DICOM_MAGIC
    except OSError:
        return False


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_frames(shape: tuple[int, ...], path: Path) -> None:
    """Refuses what is more than one 3-D scan, before its voxels are read."""
    if len(shape) > 4 and max(shape[4:]) > 1:
        raise ScanError(f"{path}: holds vectors (shape {times(shape)}), not one value a voxel; save one component")
    if len(shape) > 3 and shape[3] > 1:
        raise ScanError(
            f"{path}: a series of {shape[3]} frames (shape {times(shape)}); split it and give one 3-D frame at a time"
        )


def check_claim(shape: tuple[int, ...], room: int, path: Path, format_name: str) -> None:
    """Refuses voxels that a header claims and its file cannot hold, before memory is taken for them.

    Args:
        shape: As the header says.
        room: Voxels that a file of this size can hold at the most.
        path: The file, for the error.
        format_name: Likewise.
    """
    if min(shape) < 0:
        raise ScanError(f"{path}: its header claims sides of {times(shape)} voxels; copy or export it again")
    voxels = math.prod(map(int, shape))
    if voxels > VOXELS:
        raise ScanError(f"{path}: its header claims {voxels} voxels, and at most {VOXELS} are read; cut the scan")
    if voxels > room:
        raise ScanError(
            f"{path}: cannot be read as {format_name} (its header claims {voxels} voxels, a file of this size holds at "
            f"most {room}); copy or export it again"
        )


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


def times(numbers: Iterable[float]) -> str:
    """Sizes in words: "2 x 3 x 4"."""
    return " x ".join(f"{number:g}" for number in numbers)


# --- NIfTI ------------------------------------------------------------------------------------------------------------


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        with _quiet(nib.imageglobals.logger):
            # No memory map: a file that is cut short while it is mapped kills the process.
            image = _nifti_class(path).from_filename(path, mmap=False)
            _check_frames(image.shape, path)
            content = path.stat().st_size * (1 if path.name.lower().endswith(".nii") else DEFLATION)
            room = max(content - int(image.dataobj.offset), 0) // image.get_data_dtype().itemsize
            check_claim(image.shape, room, path, "NIfTI")
            _check_nifti_spacing(image, path)
            scaled = (image.dataobj.slope, image.dataobj.inter) != (1.0, 0.0)
            if scaled and image.get_data_dtype().kind in "iuf":
                array = image.get_fdata(dtype=np.float32, caching="unchanged")
            else:
                array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
        if isinstance(error, ScanError):
            raise
        raise ScanError(f"{path}: cannot be read as NIfTI ({one_line(error)}); copy or export it again") from None
    # (D, H, W, 1, ...) -> (D, H, W)
    return array.reshape(array.shape[:3]) if array.ndim > 3 else array, affine_in_mm(image)


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


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_nifti_spacing(image, path: Path) -> None:
    """Refuses the zero spacing that nibabel replaces by 1 mm on reading."""
    import nibabel as nib

    if image.header["sform_code"] > 0:
        return  # then the header's spacing is not used
    with nib.openers.ImageOpener(path) as file:
        stored = type(image.header).from_fileobj(file, check=False)
    spacing = stored["pixdim"][1:4]
    if not np.isfinite(spacing).all() or not (spacing != 0).all():
        raise ScanError(f"{path}: voxel spacing {times(spacing)} mm is not usable; correct the header")


# --- NRRD and MetaImage -----------------------------------------------------------------------------------------------


@contextmanager
def _itk(path: Path, format_name: str) -> Iterator[None]:
    """Keeps ITK from printing warnings, and turns its errors into a `ScanError`."""
    import SimpleITK as sitk

    warnings = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    except RuntimeError as error:
        raise ScanError(
            f"{path}: cannot be read as {format_name} ({one_line(error)}); copy or export it again"
        ) from None
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warnings)


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk

    if not _is_text(path):  # SimpleITK would end the process
        raise ScanError(f"{path}: its path is not text in UTF-8, as ITK needs it; rename it")
    format_name = "NRRD" if path.suffix.lower() in (".nrrd", ".nhdr") else "MetaImage"
    data = _data_file(path, format_name)
    with _itk(path, format_name):
        reader = sitk.ImageFileReader()
        reader.SetImageIO("NrrdImageIO" if format_name == "NRRD" else "MetaImageIO")
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        _check_frames(reader.GetSize(), path)
        _check_components(reader, path)
        check_claim(reader.GetSize(), data.stat().st_size * DEFLATION, path, format_name)
        image = reader.Execute()
    return _array_and_affine(image)


def _data_file(path: Path, format_name: str) -> Path:
    """The file with the voxels: the header's own, or another one in its folder.

    Raises:
        ScanError: When they are in several files, or in one elsewhere, which a header from a stranger must not name.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:  # of a user who may not read it
        raise ScanError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if format_name == "NRRD":
        header = re.split(rb"\r?\n\r?\n", header, maxsplit=1)[0]
        for line in header.splitlines():
            # ITK's reader writes past its buffers for a field of a thousand characters; comments and pairs are safe.
            if len(line) > NRRD_FIELD and not re.match(rb"#|[^:]*:=", line):
                raise ScanError(f"{path}: cannot be read as NRRD (a field has {len(line)} characters); save it again")
    data = path
    for name in re.findall(rb"^\s*(?:ElementDataFile\s*[=:]|data ?file\s*:)[ \t]*(.*?)\s*$", header, re.I | re.M):
        if name.upper() == b"LOCAL":
            continue
        text = name.decode("utf-8", "replace")
        if text.upper().startswith("LIST") or "%" in text or "\0" in text:
            raise ScanError(f"{path}: its voxels are in several files ({text}); save them as one")
        data = path.parent / text
        try:
            is_inside, is_file = data.resolve().is_relative_to(path.parent.resolve()), data.is_file()
        except OSError as error:  # a name that is too long
            raise ScanError(f"{path}: the file with its voxels cannot be read ({error.strerror})") from None
        if not is_inside:
            raise ScanError(f"{path}: its voxels are in another folder ({text}); copy that file beside it")
        if not is_file:
            raise ScanError(f"{path}: the file with its voxels is missing ({text}); copy it beside it")
    return data


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_components(reader: sitk.ImageFileReader, path: Path) -> None:
    if reader.GetNumberOfComponents() > 1:
        raise ScanError(
            f"{path}: holds {reader.GetNumberOfComponents()} values a voxel (colour or vectors); save one component"
        )


def _array_and_affine(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """An ITK image as (D, H, W) in index order, and its affine in RAS mm."""
    import SimpleITK as sitk

    if image.GetDimension() == 4:  # of one frame, as checked before
        image = image[..., 0]
    array = sitk.GetArrayFromImage(image).transpose()  # (k, j, i) -> (i, j, k)
    affine = np.eye(image.GetDimension() + 1)
    direction = np.reshape(image.GetDirection(), affine[:-1, :-1].shape)
    affine[:-1, :-1] = direction * image.GetSpacing()
    affine[:-1, -1] = image.GetOrigin()
    return array, LPS_TO_RAS @ affine if len(affine) == 4 else affine


def one_line(error: Exception) -> str:
    """What matters of a library's message: nibabel's first line; of ITK's, the last that gives an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if not isinstance(error, RuntimeError):
        return lines[0]
    line = next((line for line in reversed(lines) if not line.startswith("Reason:")), lines[-1])
    return re.sub(r"^(sitk::|ITK )ERROR: (\w+\(0x\w+\): )?", "", line)
