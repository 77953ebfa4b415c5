"""Read NRRD and MetaImage (MHA, MHD) through ITK."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medmim.errors import ScanError
from medmim.formats import LPS_TO_RAS, check_claim, check_frames, one_line
from medmim.limits import DEFLATION

if TYPE_CHECKING:
    import SimpleITK as sitk

HEADER_BYTES = 1_000_000  # of NRRD and MetaImage, in which they may name another file
PACKED_BYTES = 1 << 16  # of compressed voxels, unpacked at a time
ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS
NRRD_FIELD = 500  # characters of a field in its header; three vectors in full precision have 230


def read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The voxels (D, H, W) of a file in its index order, and its affine (4, 4) in RAS mm.

    Raises:
        ScanError: When it cannot be read, is more than one 3-D scan, or its voxels are in files elsewhere.
    """
    import SimpleITK as sitk

    if not _is_text(path):  # SimpleITK would end the process
        raise ScanError(f"{path}: its path is not text in UTF-8, as ITK needs it; rename it")
    format_name, header = _format_of(path), _header(path)
    data = _data_file(path, header, format_name)
    with _itk(path, format_name):
        reader = sitk.ImageFileReader()
        reader.SetImageIO("NrrdImageIO" if format_name == "NRRD" else "MetaImageIO")
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        check_frames(reader.GetSize(), path)
        _check_components(reader, path)
        check_claim(reader.GetSize(), data.stat().st_size * DEFLATION, path, format_name)
        image = reader.Execute()
    array, affine = _array_and_affine(image)
    if format_name == "MetaImage":
        _check_unpacked(array, path, header, data)
    return array, affine


def itk_files(path: Path) -> list[Path]:
    """The file, and the one with its voxels where that is another.

    Raises:
        ScanError: When they are in several files, or in one elsewhere.
    """
    return list(dict.fromkeys([path, _data_file(path, _header(path), _format_of(path))]))


def _format_of(path: Path) -> str:
    return "NRRD" if path.suffix.lower() in (".nrrd", ".nhdr") else "MetaImage"


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


def _header(path: Path) -> bytes:
    """What a file starts with."""
    try:
        with open(path, "rb") as file:
            return file.read(HEADER_BYTES)
    except OSError as error:  # of a user who may not read it
        raise ScanError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _data_file(path: Path, header: bytes, format_name: str) -> Path:
    """The file with the voxels: the header's own, or another one in its folder.

    Raises:
        ScanError: When they are in several files, or in one elsewhere, which a header from a stranger must not name.
    """
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


def _check_unpacked(array: np.ndarray, path: Path, header: bytes, data: Path) -> None:
    """Refuses the voxels of a compressed MetaImage that are not those of its file.

    Of damaged ones, ITK prints "Uncompress failed" and gives whatever was in memory.
    """
    fields = re.search(rb"\A(.*?)^ElementDataFile[^\n]*\n", header, re.M | re.S)
    if fields is None or not re.search(rb"^CompressedData\s*[=:]\s*[Tt1]", fields[1], re.M):
        return
    unpack = zlib.decompressobj(ZLIB_OR_GZIP)
    checksum = length = 0
    with open(data, "rb") as file:
        file.seek(fields.end() if data == path else 0)
        try:
            while not unpack.eof and length <= array.nbytes and (packed := file.read(PACKED_BYTES)):
                piece = unpack.decompress(packed)
                checksum, length = zlib.crc32(piece, checksum), length + len(piece)
        except zlib.error:
            pass
    read = np.ascontiguousarray(array.transpose())  # in the order of the file
    if not unpack.eof or checksum not in (zlib.crc32(read), zlib.crc32(read.byteswap())):
        raise ScanError(
            f"{path}: cannot be read as MetaImage (its compressed voxels are damaged, or not as long as the header "
            "says); copy or export it again"
        )


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
