"""Read one DICOM series: a file a slice, or all slices as the frames of one file.

pydicom reads the files; ITK sees compressed frames alone (see `codecs`). Its own reader, GDCM, takes the memory that
any element says it needs, before it looks how long the file is.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmim.codecs import decode
from medmim.errors import ScanError
from medmim.formats import DICOM_SUFFIX, LPS_TO_RAS, SCAN_SUFFIXES, check_claim, one_line
from medmim.limits import DEFLATION

if TYPE_CHECKING:
    from pydicom import Dataset

MODALITIES = {"PT": "PET"}  # of DICOM, whose names for others are those used here

# Slice distances are written with few decimals; a missing slice is off by 100 %.
SLICE_TOLERANCE = 0.1
SPACING_TOLERANCE = 1e-3  # from pixel to pixel: half of a pixel over a slice of 512
SHIFT_TOLERANCE = 0.5  # of a pixel, along the slices

# Elements that are read; others are passed over.
SERIES_UID = 0x0020000E
SERIES = ("SeriesInstanceUID", "SeriesDescription", "Modality")
PIXELS = (
    *("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
)
VALUES = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
SCALE = {"RescaleSlope": 1.0, "RescaleIntercept": 0.0}  # and what is meant where they are missing
# In files of several frames, where elements are that otherwise stand at the top: in these groups of these sequences.
GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
GROUP_OF = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}


@dataclass(frozen=True, eq=False)
class _Slice:
    """A frame of a file: where it lies (mm, LPS), and how its values become those of the scan."""

    file: Path
    frame: int
    position: np.ndarray  # (3,): of the first voxel
    orientation: np.ndarray  # (6,): the directions of growing columns and of growing rows
    spacing: np.ndarray  # (2,): from row to row and from column to column
    slope: float
    intercept: float


def read_dicom(path: Path) -> tuple[np.ndarray, np.ndarray, str | None]:
    """The array (D, H, W), affine and modality of a series, as `Volume` has them.

    Args:
        path: The folder that holds it, or one file of it.

    Raises:
        ScanError: When that is not one evenly spaced stack of grey slices, or cannot be read.
    """
    with _errors(path):
        files = _only_series(path) if path.is_dir() else _series_of(path)
        _check_pixels(files, path)
        of_file = {file: list(_slices(file, header, path)) for file, header in files.items()}
        slices, affine = _in_order([piece for pieces in of_file.values() for piece in pieces], path)
        images: dict[_Slice, np.ndarray] = {}
        for file, frames in _frames(files):
            images |= {piece: _scaled(frames[piece.frame], piece) for piece in of_file[file]}
        array = np.stack([images[piece] for piece in slices])
        modality = next(iter(files.values())).get("Modality")
    # (slices, rows, columns) -> (columns, rows, slices)
    return array.transpose(), LPS_TO_RAS @ affine, MODALITIES.get(modality, modality)


# --- files ------------------------------------------------------------------------------------------------------------


def dicom_files(folder: Path) -> list[Path]:
    """The files of a folder that say they are DICOM, not those of folders in it."""
    return [path for path in _names_in(folder) if path.is_file() and _is_dicom(path)]


def series_files(path: Path) -> list[Path]:
    """The files of the series that a file is part of, in its folder.

    Raises:
        ScanError: When it is no DICOM file, or a damaged one may be of the series, too.
    """
    return list(_series_of(path))


def _names_in(folder: Path) -> list[Path]:
    """What is in a folder, in the order of names; macOS puts files that start with a dot beside others."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turns whatever pydicom meets in a broken file into a `ScanError`, and keeps it from printing warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ScanError:
            raise
        except Exception as error:  # there is no class of what a Python parser may raise
            raise ScanError(f"{path}: cannot be read as DICOM ({one_line(error)}); copy or export it again") from None


def _header(path: Path) -> Dataset:
    """What a file says of its series, its pixels and where they lie.

    Raises:
        ScanError: When it is no DICOM file.
    """
    import pydicom
    from pydicom.filereader import read_file_meta_info

    with _errors(path):
        if read_file_meta_info(path).get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
            raise ScanError(
                f"{path}: deflated DICOM is not read, as it may be of any size once unpacked; save it plain"
            )
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*SERIES, *PIXELS, *GROUP_OF, *GROUPS])


def _only_series(folder: Path) -> dict[Path, Dataset]:
    series, damaged = _series(folder)
    if not series:
        _check_whole(damaged, None)
        if others := [path for path in sorted(folder.iterdir()) if path.name.lower().endswith(SCAN_SUFFIXES)]:
            raise ScanError(f"{folder}: is a folder, and one scan is read here; give a file of it, such as {others[0]}")
        raise ScanError(f"{folder}: holds no DICOM files; give a scan, or the folder that directly holds one series")
    # A localiser of one slice beside the series is passed over.
    volumes = {uid: files for uid, files in series.items() if sum(map(_count, files.values())) > 1} or series
    if len(volumes) > 1:
        listed = "; ".join(_describe(uid, files) for uid, files in volumes.items())
        raise ScanError(
            f"{folder}: holds {len(volumes)} series, give one file of the one you want, or a folder with only that "
            f"series: {listed}"
        )
    uid, files = next(iter(volumes.items()))
    _check_whole(damaged, uid)
    return files


def _series(folder: Path) -> tuple[dict[str, dict[Path, Dataset]], dict[str, ScanError]]:
    """The images in a folder by the UID of their series, files and their headers; and errors of damaged files.

    The UID of a damaged file is "" where it cannot be read.
    """
    series: dict[str, dict[Path, Dataset]] = {}
    damaged: dict[str, ScanError] = {}
    for path in _names_in(folder):
        if path.name.lower().endswith(DICOM_SUFFIX) and not path.exists():
            damaged.setdefault("", ScanError(f"{path}: a link to a file that is not there; copy or export it again"))
        elif path.is_file() and _is_dicom(path):
            try:
                header = _header(path)
                if _is_image(header, path):
                    series.setdefault(_uid(header), {})[path] = header
            except ScanError as error:
                damaged.setdefault(_uid_of_damaged(path), error)
    return series, damaged


def _is_image(header: Dataset, path: Path) -> bool:
    """Whether a file is one, and no report, structure, or list of the other files.

    Raises:
        ScanError: When it says that it is, and ends before its size.
    """
    with _errors(path):
        if "Rows" not in header and "Image" in header.file_meta.MediaStorageSOPClassUID.name:
            raise ScanError(f"{path}: cannot be read as DICOM (it ends in its header); copy or export it again")
    return "Rows" in header


def _check_whole(damaged: dict[str, ScanError], uid: str | None) -> None:
    """Refuses a series that a damaged file may be of: without it, the scan could be a slice short.

    Args:
        damaged: See `_series`.
        uid: Of the series; None for any.

    Raises:
        ScanError: That of the damaged file.
    """
    for of_series, error in damaged.items():
        if uid in (None, of_series):
            raise error
        if not of_series:
            raise ScanError(f"{error}, or take it out of the folder if it is of another series")


def _uid_of_damaged(path: Path) -> str:
    """The UID of the series of a file that is broken somewhere behind it; "" where it cannot be read."""
    from pydicom.filereader import read_partial

    try:
        with open(path, "rb") as file:
            header = read_partial(file, stop_when=lambda tag, vr, length: tag > SERIES_UID)
        return str(header.get("SeriesInstanceUID") or "")
    except Exception:  # see `_errors`
        return ""


def _is_dicom(path: Path) -> bool:
    """Whether a file says that it is DICOM, or is nothing that it could be taken for."""
    from pydicom.misc import is_dicom

    return is_dicom(path) or path.name.lower().endswith(DICOM_SUFFIX) or not path.stat().st_size


def _series_of(path: Path) -> dict[Path, Dataset]:
    """The series that a file is part of."""
    header = _header(path)
    series, damaged = _series(path.parent)
    _check_whole(damaged, _uid(header))
    return series.get(_uid(header), {path: header})


def _uid(header: Dataset) -> str:
    return str(header.get("SeriesInstanceUID"))


def _describe(uid: str, files: dict[Path, Dataset]) -> str:
    path, header = next(iter(files.items()))
    description = header.get("SeriesDescription") or "no description"
    return f"{path.name} ({description}, {header.get('Modality', '?')}, {len(files)} files, UID {uid})"


# --- slices -----------------------------------------------------------------------------------------------------------


def _check_pixels(files: dict[Path, Dataset], path: Path) -> None:
    """Refuses colours, slices of different sizes, and more voxels than the files can hold."""
    headers = list(files.values())
    samples = max(int(header.get("SamplesPerPixel") or 1) for header in headers)
    if samples > 1:
        raise ScanError(f"{path}: holds {samples} values a voxel (colour); give a scan")
    if any(header.get("PhotometricInterpretation") == "PALETTE COLOR" for header in headers):
        raise ScanError(f"{path}: holds numbers of colours (a palette), not one value a voxel; give a scan")
    sizes = {(int(header.Rows), int(header.Columns)) for header in headers}
    if len(sizes) > 1:
        raise ScanError(f"{path}: its slices have different sizes; give the files of one 3-D series")
    room = sum(file.stat().st_size for file in files) * DEFLATION  # of compressed ones; others are checked when read
    check_claim((sum(_count(header) for header in headers), *sizes.pop()), room, path, "DICOM")


def _count(header: Dataset) -> int:
    return int(header.get("NumberOfFrames") or 1)


def _slices(file: Path, header: Dataset, path: Path) -> Iterator[_Slice]:
    """The slices of a file.

    Raises:
        ScanError: When it does not say where they lie.
    """
    problem = ScanError(
        f"{path}: {file.name} does not say where its slices lie; give one 3-D series (not a photograph, report or "
        "projection)"
    )
    per_frame, shared = (header.get(keyword) or [] for keyword in GROUPS)
    # The number of frames is believed where there is a group for each, and no more is made of it than the file has.
    if len(per_frame) != _count(header) and (per_frame or _count(header) > 1):
        raise problem
    for frame in range(_count(header)):
        places = [header] if not per_frame else [per_frame[frame], *shared, header]
        try:
            position, orientation, spacing = (
                np.array([float(number) for number in _find(keyword, places)]).reshape(count)
                for keyword, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2))
            )
            scale = [float(_find(keyword, places, default)) for keyword, default in SCALE.items()]
        except (TypeError, ValueError):
            raise problem from None
        if not all(np.isfinite(numbers).all() for numbers in (position, orientation, spacing, scale)):
            raise problem
        yield _Slice(file, frame, position, orientation, spacing, *scale)


def _find(keyword: str, places: list[Dataset], default: float | None = None) -> Any:
    """An element from the first of some data sets that has it, at the top or in its functional group."""
    for place in places:
        for holder in (place, *(place.get(GROUP_OF[keyword]) or [])):
            if holder.get(keyword) is not None:
                return holder[keyword].value
    return default


def _in_order(slices: list[_Slice], path: Path) -> tuple[list[_Slice], np.ndarray]:
    """Slices in the order of their positions, and the affine in mm (LPS) of (column, row, slice)."""
    first = slices[0]
    if any(np.abs(piece.orientation - first.orientation).max() > 1e-3 for piece in slices):
        raise ScanError(
            f"{path}: its slices have different orientations (a localiser?); give a series of parallel slices"
        )
    if not all(np.allclose(piece.spacing, first.spacing, rtol=SPACING_TOLERANCE) for piece in slices):
        raise ScanError(f"{path}: its slices have different pixel spacing; give the files of one 3-D series")
    columns, rows = first.orientation[:3], first.orientation[3:]
    normal = np.cross(columns, rows)
    slices = sorted(slices, key=lambda piece: piece.position @ normal)
    first, last = slices[0], slices[-1]
    step = normal
    if len(slices) > 1:
        _check_gaps(slices, normal, path)
        # The positions say where slices are, which with gantry tilt is not along the normal.
        step = (last.position - first.position) / (len(slices) - 1)
        _check_straight(slices, step, normal, path)
    affine = np.eye(4)
    affine[:3] = np.stack([columns * first.spacing[1], rows * first.spacing[0], step, first.position], axis=1)
    return slices, affine


def _check_gaps(slices: list[_Slice], normal: np.ndarray, path: Path) -> None:
    gaps = np.diff([piece.position @ normal for piece in slices])
    typical = float(np.median(gaps))
    if (gaps < SLICE_TOLERANCE * typical).any() or typical <= 0:
        raise ScanError(
            f"{path}: several slices at the same position (time points or echoes?); give the files of one 3-D volume"
        )
    wrong = np.flatnonzero(np.abs(gaps - typical) > SLICE_TOLERANCE * typical)
    if wrong.size:
        raise ScanError(
            f"{path}: slices are not evenly spaced: {gaps[wrong[0]]:.4g} mm after {slices[wrong[0]].file.name}, "
            f"{typical:.4g} mm elsewhere; export the complete series, or resample it to even spacing"
        )


def _check_straight(slices: list[_Slice], step: np.ndarray, normal: np.ndarray, path: Path) -> None:
    """Refuses slices that are shifted along themselves, as of two stacks: no one affine says where they lie."""
    line = slices[0].position + np.arange(len(slices))[:, None] * step
    off = np.array([piece.position for piece in slices]) - line  # (slices, 3) mm
    shifts = np.linalg.norm(off - np.outer(off @ normal, normal), axis=1)
    most = int(shifts.argmax())
    if shifts[most] > SHIFT_TOLERANCE * slices[0].spacing.max():
        raise ScanError(
            f"{path}: its slices are no straight stack: {slices[most].file.name} lies {shifts[most]:.4g} mm beside the "
            "line from the first to the last; give the files of one 3-D volume"
        )


# --- values -----------------------------------------------------------------------------------------------------------


def _frames(files: Iterable[Path]) -> Iterator[tuple[Path, np.ndarray]]:
    """Each file with its values as stored: (frames, rows, columns); compressed ones last."""
    import pydicom

    with tempfile.TemporaryDirectory(prefix="medmim-dicom-") as folder:
        packed: dict[Path, Path] = {}
        for file in files:
            with _errors(file):
                data = pydicom.dcmread(file, specific_tags=[*PIXELS, *VALUES])
            if data.file_meta.TransferSyntaxUID.is_encapsulated:
                packed[file] = Path(folder) / f"{len(packed)}.dcm"
                _write_pixels(data, packed[file])
            else:
                yield file, data.pixel_array.reshape(-1, int(data.Rows), int(data.Columns))
        if packed:
            decode(packed.values())
        for file, copy in packed.items():
            yield file, np.load(copy.with_suffix(".npy"), allow_pickle=False)


def _write_pixels(data: Dataset, file: Path) -> None:
    """A file with the compressed frames of another one, and nothing else."""
    from pydicom import Dataset
    from pydicom.encaps import encapsulate, generate_frames
    from pydicom.uid import MultiFrameGrayscaleWordSecondaryCaptureImageStorage, generate_uid

    frames = list(generate_frames(data.PixelData, number_of_frames=_count(data)))
    alone = Dataset()
    alone.update({data[keyword].tag: data[keyword] for keyword in PIXELS if keyword in data})
    alone.SOPClassUID = MultiFrameGrayscaleWordSecondaryCaptureImageStorage  # of which ITK takes the values as stored
    alone.SOPInstanceUID = generate_uid()
    alone.PhotometricInterpretation = "MONOCHROME2"  # of MONOCHROME1, which says how to draw them, ITK turns them over
    alone.NumberOfFrames = len(frames)
    alone.PixelData = encapsulate(frames)
    alone["PixelData"].VR, alone["PixelData"].is_undefined_length = "OB", True
    alone.ensure_file_meta()
    alone.file_meta.TransferSyntaxUID = data.file_meta.TransferSyntaxUID
    alone.save_as(file, enforce_file_format=True)


def _scaled(frame: np.ndarray, piece: _Slice) -> np.ndarray:
    """A slice in the units of the scan: in integers where it is one of integers, else in float32."""
    if (piece.slope, piece.intercept) == (1.0, 0.0):
        return frame
    if piece.slope.is_integer() and piece.intercept.is_integer() and frame.dtype.kind in "iu":
        ends = [int(value) * int(piece.slope) + int(piece.intercept) for value in (frame.min(), frame.max())]
        for kind in (np.int16, np.int32):
            if all(np.iinfo(kind).min <= value <= np.iinfo(kind).max for value in ends):
                return (frame.astype(np.int64) * int(piece.slope) + int(piece.intercept)).astype(kind)
    return frame.astype(np.float32) * np.float32(piece.slope) + np.float32(piece.intercept)
