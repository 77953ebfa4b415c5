"""A DICOM series is the same scan however it is stored: a file a slice or one for all, scaled, compressed, tilted."""

import resource
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from medmim.errors import ScanError
from medmim.volumes import load_volume
from scans import SHAPE, SPACING, itk_image, rotated_affine, voxels, write_dicom

EXAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"  # of pydicom's own tests, written by many programs


@pytest.mark.parametrize("give", ["folder", "file"])
def test_dicom_agrees(tmp_path, give):
    folder = write_dicom(tmp_path / "series", voxels(), rotated_affine())
    volume = load_volume(folder if give == "folder" else next(folder.iterdir()))
    # GDCM sorts slices along the normal, which here is the order in which they were written.
    np.testing.assert_array_equal(volume.array, voxels()[None])
    np.testing.assert_allclose(volume.affine, rotated_affine(), atol=1e-4)
    assert volume.modality == "CT"


@pytest.mark.parametrize(("code", "modality"), [("MR", "MR"), ("PT", "PET"), ("US", "US")])
def test_dicom_modality(tmp_path, code, modality):
    folder = write_dicom(tmp_path / "series", voxels(), np.eye(4), modality=code)
    assert load_volume(folder).modality == modality


def test_dicom_slices_may_have_a_scale_each(tmp_path):
    slopes = [1, 0.5, 0.25, 0.5, 0.25, 0.5]
    folder = write_dicom(tmp_path / "series", voxels(), np.eye(4), modality="PT", slopes=slopes)
    np.testing.assert_allclose(load_volume(folder).array[0], voxels() * np.array(slopes))


def test_dicom_gantry_tilt_is_in_the_affine(tmp_path):
    folder = write_dicom(tmp_path / "series", voxels(), rotated_affine(), tilt=0.7)
    expected = rotated_affine()
    expected[:3, 2] += 0.7 * expected[:3, 0] / SPACING[0]
    np.testing.assert_allclose(load_volume(folder).affine, expected, atol=1e-4)


def test_dicom_localiser_beside_the_series_is_passed_over(tmp_path):
    folder = write_dicom(tmp_path / "series", voxels(), rotated_affine())
    write_dicom(folder, voxels()[:, :, :1], np.eye(4), uid="1.2.9", description="scout")
    assert load_volume(folder).array.shape == (1, *SHAPE)


def test_dicom_file_picks_its_series_out_of_several(tmp_path):
    folder = write_dicom(tmp_path / "series", voxels(), rotated_affine())
    write_dicom(folder, voxels() + 1, rotated_affine(), uid="1.2.9", modality="MR")
    volume = load_volume(folder / "1.2.9-99.dcm")
    assert volume.modality == "MR"
    np.testing.assert_array_equal(volume.array[0], voxels() + 1)


def test_dicom_frames_of_one_file(tmp_path):
    image = sitk.Cast(itk_image(voxels(), rotated_affine()), sitk.sitkUInt16)
    sitk.WriteImage(image, str(tmp_path / "frames.dcm"))
    assert int(pydicom.dcmread(tmp_path / "frames.dcm").NumberOfFrames) == SHAPE[2]
    volume = load_volume(tmp_path / "frames.dcm")
    np.testing.assert_array_equal(volume.array, voxels()[None])
    np.testing.assert_allclose(volume.affine, rotated_affine(), atol=1e-4)


@pytest.mark.parametrize(
    ("intercept", "slope", "dtype"),
    [(-1024, 1, np.int16), (-40_000, 2, np.int32), (0.5, 1, np.float32), (0, 0.25, np.float32)],
)
def test_dicom_scale_is_applied_in_integers_where_it_is_one(tmp_path, intercept, slope, dtype):
    folder = write_dicom(tmp_path / "series", voxels(), np.eye(4))
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.RescaleIntercept, data.RescaleSlope = intercept, slope
        data.save_as(path)
    volume = load_volume(folder)
    assert volume.array.dtype == dtype
    np.testing.assert_array_equal(volume.array[0], voxels().astype(float) * slope + intercept)


def stack(folder: Path, source: Path, slices: int = 3) -> Path:
    """A series of one and the same slice at different places."""
    folder.mkdir()
    for k in range(slices):
        data = pydicom.dcmread(source)
        data.ImagePositionPatient = [0, 0, 2 * k]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.PixelSpacing = [1.5, 0.5]
        data.SeriesInstanceUID = "1.2.3"
        data.save_as(folder / f"{k}.dcm")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        *("MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless"),
        *("MR_small_bigendian", "MR_small_implicit", "MR_small_padded"),
    ],
)
def test_dicom_of_every_encoding(tmp_path, name):
    expected = pydicom.dcmread(EXAMPLES / "MR_small.dcm").pixel_array
    volume = load_volume(stack(tmp_path / "series", EXAMPLES / f"{name}.dcm"))
    for k in range(3):
        np.testing.assert_array_equal(volume.array[0, :, :, k], expected.T)
    np.testing.assert_allclose(volume.spacing, [0.5, 1.5, 2])


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000", "RLE"])
def test_dicom_frames_compressed_without_loss(tmp_path, compressor):
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "frames.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.Execute(sitk.Cast(itk_image(voxels((32, 24, 5)), rotated_affine()), sitk.sitkUInt16))
    assert pydicom.dcmread(tmp_path / "frames.dcm").file_meta.TransferSyntaxUID.is_compressed
    volume = load_volume(tmp_path / "frames.dcm")
    np.testing.assert_array_equal(volume.array[0], voxels((32, 24, 5)))
    np.testing.assert_allclose(volume.affine, rotated_affine(), atol=1e-4)


def test_dicom_compressed_slices_are_scaled_as_others(tmp_path):
    """The values of this file are unsigned in its header and signed in its JPEG 2000 data, below zero after scaling."""
    folder = stack(tmp_path / "series", EXAMPLES / "693_J2KI.dcm", slices=2)
    data = pydicom.dcmread(EXAMPLES / "693_J2KI.dcm")
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(EXAMPLES / "693_J2KI.dcm")))[0]
    np.testing.assert_array_equal(load_volume(folder).array[0, :, :, 0], expected.T)
    assert data.RescaleIntercept < 0


def test_dicom_shown_white_at_its_lowest_has_the_same_values_compressed(tmp_path):
    """MONOCHROME1 is how to draw values, not what they are."""
    folder = write_dicom(tmp_path / "series", voxels(), rotated_affine())
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        data.PhotometricInterpretation = "MONOCHROME1"
        data.compress(pydicom.uid.RLELossless)
        data.save_as(file)
    np.testing.assert_array_equal(load_volume(folder).array[0], voxels())


def with_element(folder: Path, length: int) -> Path:
    """A series in one file of which an element claims more bytes than there are."""
    sitk.WriteImage(sitk.Cast(itk_image(voxels(), rotated_affine()), sitk.sitkUInt16), str(folder / "frames.dcm"))
    content = (folder / "frames.dcm").read_bytes()
    # Frame of Reference UID, implicit VR: group, element, then the length.
    start = content.index(b"\x20\x00\x52\x00") + 4
    (folder / "frames.dcm").write_bytes(content[:start] + length.to_bytes(4, "little") + content[start + 4 :])
    return folder / "frames.dcm"


def test_dicom_codecs_that_die_take_nothing_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr("medmim.codecs.__file__", str(tmp_path / "dies.py"))
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    with pytest.raises(ScanError, match=r"cannot be read as DICOM \(the decoder ended with -11\)"):
        load_volume(stack(tmp_path / "series", EXAMPLES / "MR_small_RLE.dcm"))


def test_dicom_takes_no_memory_that_a_file_claims(tmp_path):
    path = with_element(tmp_path, 0xF0000000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ScanError, match=r"frames\.dcm: "):
        load_volume(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def series_and_damage(folder: Path, cut_at: bytes) -> tuple[Path, Path, Path]:
    """A folder, a file of the whole series in it, and one of another series, cut before an element."""
    series = write_dicom(folder / "series", voxels(), rotated_affine())
    whole = next(series.iterdir())
    write_dicom(series, voxels()[:, :, :1], rotated_affine(), uid="1.2.9")
    other = next(series.glob("1.2.9-*"))
    other.write_bytes(other.read_bytes()[: other.read_bytes().index(cut_at)])
    return series, whole, other


def test_dicom_damage_of_another_series_is_passed_over(tmp_path):
    series, whole, other = series_and_damage(tmp_path, cut_at=b"\x28\x00\x10\x00")  # Rows
    for path in (series, whole):
        np.testing.assert_array_equal(load_volume(path).array, voxels()[None])
    with pytest.raises(ScanError, match="cannot be read as DICOM"):
        load_volume(other)


def test_dicom_damage_that_may_be_of_the_series_is_refused(tmp_path):
    series, whole, other = series_and_damage(tmp_path, cut_at=b"\x20\x00\x0e\x00")  # SeriesInstanceUID
    for path in (series, whole):
        with pytest.raises(ScanError, match=rf"{other.name}: .*, or take it out of the folder if it is of another"):
            load_volume(path)


def deflated(folder):
    return EXAMPLES / "image_dfl.dcm"


def of_two_sizes(folder):
    series = stack(folder / "series", EXAMPLES / "MR_small.dcm")
    data = pydicom.dcmread(EXAMPLES / "CT_small.dcm")
    data.ImagePositionPatient, data.SeriesInstanceUID = [0, 0, 6], "1.2.3"
    data.save_as(series / "3.dcm")
    return series


def colour(folder):
    return stack(folder / "series", EXAMPLES / "SC_rgb_jpeg_gdcm.dcm")


def a_palette(folder):
    return stack(folder / "series", EXAMPLES / "examples_palette.dcm")


def a_photograph(folder):
    data = pydicom.dcmread(EXAMPLES / "MR_small.dcm")
    del data.ImagePositionPatient
    data.save_as(folder / "photograph.dcm")
    return folder / "photograph.dcm"


def changed_from_the_fourth_on(folder, change):
    """A series in which slices are changed, the others are as they were."""
    series = stack(folder / "series", EXAMPLES / "MR_small.dcm", slices=6)
    for k in range(3, 6):
        data = pydicom.dcmread(series / f"{k}.dcm")
        change(data)
        data.save_as(series / f"{k}.dcm")
    return series


def of_two_pixel_spacings(folder):
    return changed_from_the_fourth_on(folder, lambda data: setattr(data, "PixelSpacing", [1.5, 0.55]))


def of_two_stacks(folder):
    def shift(data):
        data.ImagePositionPatient[0] = 40

    return changed_from_the_fourth_on(folder, shift)


def without_a_slice_at_the_end(folder):
    series = stack(folder / "series", EXAMPLES / "MR_small.dcm", slices=4)
    (series / "3.dcm").unlink()
    (series / "3.dcm").symlink_to("nowhere")
    return series


def more_frames_than_places(folder):
    image = sitk.Cast(itk_image(voxels(), rotated_affine()), sitk.sitkUInt16)
    sitk.WriteImage(image, str(folder / "frames.dcm"))
    data = pydicom.dcmread(folder / "frames.dcm")
    data.NumberOfFrames, data.Rows, data.Columns = 1_000_000, 1, 1
    data.save_as(folder / "frames.dcm")
    return folder / "frames.dcm"


def cut_short(folder):
    series = stack(folder / "series", EXAMPLES / "MR_small.dcm")
    (series / "1.dcm").write_bytes((series / "1.dcm").read_bytes()[:-1000])
    return series


def a_damaged_frame(folder):
    series = stack(folder / "series", EXAMPLES / "MR_small_jpeg_ls_lossless.dcm")
    content = (series / "1.dcm").read_bytes()
    (series / "1.dcm").write_bytes(content[:-700] + bytes(500) + content[-200:])
    return series


def an_empty_slice(folder):
    series = stack(folder / "series", EXAMPLES / "MR_small.dcm")
    (series / "2.dcm").write_bytes(b"")
    return series


def a_slice_cut_in_its_header(folder):
    series = stack(folder / "series", EXAMPLES / "MR_small.dcm")
    (series / "2.dcm").rename(series / "2")
    (series / "2").write_bytes((series / "2").read_bytes()[:700])
    return series


def frames_beside_scouts(folder):
    stack(folder / "series", EXAMPLES / "MR_small.dcm", slices=2)
    image = sitk.Cast(itk_image(voxels(), rotated_affine()), sitk.sitkUInt16)
    sitk.WriteImage(image, str(folder / "series" / "frames.dcm"))
    return folder / "series"


def a_report(folder):
    shutil.copy(EXAMPLES / "test-SR.dcm", folder)
    return folder


REFUSED = {
    deflated: "deflated",
    of_two_sizes: "different sizes",
    colour: "3 values a voxel",
    a_palette: "a palette",
    of_two_pixel_spacings: "different pixel spacing",
    of_two_stacks: r"no straight stack: 2\.dcm lies 16 mm beside",
    without_a_slice_at_the_end: r"3\.dcm: a link to a file that is not there",
    a_photograph: "does not say where its slices lie",
    more_frames_than_places: "does not say where its slices lie",
    cut_short: "cannot be read as DICOM",
    a_damaged_frame: r"cannot be read as DICOM \(Failed",
    an_empty_slice: r"2\.dcm: cannot be read as DICOM",
    a_slice_cut_in_its_header: r"2: cannot be read as DICOM \(it ends in its header",
    frames_beside_scouts: "2 series",
    a_report: "holds no DICOM files",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_dicom_that_is_no_scan_is_refused(tmp_path, make, capfd):
    path = make(tmp_path)
    capfd.readouterr()
    with pytest.raises(ScanError, match=REFUSED[make]) as caught:
        load_volume(path)
    assert "\n" not in str(caught.value)
    assert "".join(capfd.readouterr()) == ""
