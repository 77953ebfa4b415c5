"""Every format gives the same scan in the same place, and every broken file one sentence."""

import gzip
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medmim import folders
from medmim.errors import ScanError
from medmim.folders import find_scans
from medmim.nifti import nifti_header
from medmim.scans import as_volume
from medmim.volumes import Volume, load_volume
from scans import SHAPE, SPACING, itk_image, rotated_affine, save_nifti, voxels, write_dicom

# --- the same scan from every format ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_file_formats_agree(tmp_path, suffix):
    path = tmp_path / f"scan{suffix}"
    if suffix.startswith(".nii"):
        save_nifti(path, voxels())
    else:
        sitk.WriteImage(itk_image(voxels(), rotated_affine()), str(path))
    volume = load_volume(path)
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, voxels()[None])
    np.testing.assert_allclose(volume.affine, rotated_affine(), atol=1e-5)
    np.testing.assert_allclose(volume.spacing, SPACING, rtol=1e-6)
    assert volume.orientation == "LPS"
    assert (volume.path, volume.modality) == (path, None)


@pytest.mark.parametrize("suffix", [".mha", ".mhd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_compressed_metaimages_of_either_byte_order(tmp_path, suffix, dtype):
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(itk_image(voxels().astype(dtype), np.eye(4)), str(path), useCompression=True)
    np.testing.assert_array_equal(load_volume(path).array[0], voxels().astype(dtype))
    if suffix == ".mhd":
        path.write_bytes(path.read_bytes().replace(b"ByteOrderMSB = False", b"ByteOrderMSB = True"))
        path.with_suffix(".zraw").write_bytes(zlib.compress(voxels().astype(dtype).T.byteswap().tobytes()))
        path.write_bytes(re.sub(rb"CompressedDataSize.*\n", b"", path.read_bytes()))
        np.testing.assert_array_equal(load_volume(path).array[0], voxels().astype(dtype))


def test_nifti_scale_factors_are_applied(tmp_path):
    image = nib.Nifti1Image(voxels(), np.eye(4))
    image.header.set_slope_inter(0.5, -10)
    image.to_filename(tmp_path / "scan.nii")
    volume = load_volume(tmp_path / "scan.nii")
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array[0], voxels() * 0.5 - 10)


@pytest.mark.parametrize("shape", [(*SHAPE, 1), (*SHAPE, 1, 1)])
def test_single_frame_of_a_series_is_a_scan(tmp_path, shape):
    path = save_nifti(tmp_path / "scan.nii.gz", voxels(shape))
    np.testing.assert_array_equal(load_volume(path).array[0], voxels())


def test_big_endian_is_read(tmp_path):
    nib.Nifti1Image(voxels(), np.eye(4), nib.Nifti1Header(endianness=">")).to_filename(tmp_path / "scan.nii")
    np.testing.assert_array_equal(load_volume(tmp_path / "scan.nii").array[0], voxels())


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1000), ("mm", 1), ("micron", 0.001), ("unknown", 1)])
def test_nifti_in_any_unit_lies_where_itk_has_it(tmp_path, unit, mm):
    image = nib.Nifti1Image(voxels(), rotated_affine())
    image.header.set_xyzt_units(unit, "sec")
    image.to_filename(tmp_path / "scan.nii")
    expected = np.diag([mm, mm, mm, 1]) @ rotated_affine()
    for volume in (load_volume(tmp_path / "scan.nii"), as_volume(nib.load(tmp_path / "scan.nii"), np.eye(4))):
        np.testing.assert_allclose(volume.affine, expected, rtol=1e-5, atol=1e-5 * mm)
        itk = sitk.ReadImage(str(tmp_path / "scan.nii"))
        np.testing.assert_allclose(volume.spacing, itk.GetSpacing(), rtol=1e-5)
        np.testing.assert_allclose(volume.affine[:3, 3] * [-1, -1, 1], itk.GetOrigin(), rtol=1e-5)


# --- scans in a folder -----------------------------------------------------------------------------------------------


def test_scans_are_found_at_any_depth_by_suffix_and_slices_by_what_they_are(tmp_path):
    affine = rotated_affine()
    renames = {"lower": "{}.dcm", "upper": "{}.DCM", "none": "IM{}", "uid": "1.2.840.{}", "ima": "{}.IMA"}
    for name, form in renames.items():
        folder = write_dicom(tmp_path / name, voxels(), affine)
        for i, path in enumerate(sorted(folder.iterdir())):
            path.rename(folder / form.format(i))
    for name in ("LICENSE", "README.txt", "a.csv", "index.html", "notes"):
        (tmp_path / "none" / name).write_text("of the scan")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("A.NII.GZ", "b.nrrd", "._b.nrrd", "._c.dcm", "._IM1"):
        (tmp_path / "deep" / "er" / name).touch()
    (tmp_path / "deep" / "notes").write_text("no scan")
    os.mkfifo(tmp_path / "deep" / "pipe")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "c.nii").touch()
    shutil.copy(tmp_path / "none" / "IM0", tmp_path / "DICOMDIR")
    files = [tmp_path / "deep" / "er" / name for name in ("A.NII.GZ", "b.nrrd")]
    assert find_scans(tmp_path) == sorted([*files, *(tmp_path / name for name in renames)])
    for name in renames:
        assert find_scans(tmp_path / name) == [tmp_path / name]
        np.testing.assert_array_equal(load_volume(tmp_path / name).array[0], voxels())


def test_linked_folders_are_followed_once(tmp_path):
    for place in ("disk/a", "scans/b/inner", "scans/slices"):
        (tmp_path / place).mkdir(parents=True)
    for scan in ("disk/a/1.nii", "scans/b/inner/2.nii", "scans/slices/3.dcm"):
        (tmp_path / scan).touch()
    scans = tmp_path / "scans"
    for link, target in (
        ("a", tmp_path / "disk" / "a"),
        ("a_again", tmp_path / "disk"),  # has another way to the same scan
        ("b_link", "b/inner"),
        ("b/inner/up", "../../.."),
        ("b/inner/self", "."),
        ("lost", "nowhere"),
    ):
        (scans / link).symlink_to(target)
    found = [scans / name for name in ("a/1.nii", "b/inner/2.nii", "slices")]
    assert find_scans(scans) == found
    (tmp_path / "link").symlink_to("scans")
    assert find_scans(tmp_path / "link") == [tmp_path / "link" / path.relative_to(scans) for path in found]


def test_few_files_are_opened_to_look_for_slices(tmp_path, monkeypatch):
    for i in range(50):
        (tmp_path / f"{i}.txt").touch()
    opened = []
    monkeypatch.setattr(folders, "_starts_as_dicom", opened.append)
    assert find_scans(tmp_path) == []
    assert len(set(opened)) == folders.LOOKS


def test_what_is_lost_in_a_folder_is_found_and_refused(tmp_path):
    """Links to files that were not copied, as git-annex leaves them, are no reason to do without a scan unheard."""
    names = "a.nii.gz", "b.nrrd", "slices/1.dcm"
    (tmp_path / "slices").mkdir()
    for name in names:
        (tmp_path / name).symlink_to("nowhere")
    found = find_scans(tmp_path)
    assert found == [tmp_path / "a.nii.gz", tmp_path / "b.nrrd", tmp_path / "slices"]
    for scan, message in zip(found, ("no such file", "no such file", "not there"), strict=True):
        with pytest.raises(ScanError, match=message):
            load_volume(scan)


def test_folder_that_may_not_be_listed_is_found_and_refused(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    save_nifti(tmp_path / "scan.nii", voxels())
    scandir, listdir = os.scandir, os.listdir

    def closed(call):
        def guarded(path):
            if Path(path).name == "closed":
                raise PermissionError(13, "Permission denied", str(path))
            return call(path)

        return guarded

    monkeypatch.setattr(os, "scandir", closed(scandir))
    monkeypatch.setattr(os, "listdir", closed(listdir))
    assert find_scans(tmp_path) == [tmp_path / "closed", tmp_path / "scan.nii"]
    with pytest.raises(ScanError, match=r"closed: cannot be read as DICOM .*Permission denied"):
        load_volume(tmp_path / "closed")


# --- one sentence for every broken scan -------------------------------------------------------------------------------


def missing(folder):
    return folder / "nowhere.nii.gz"


def empty(folder):
    (folder / "scan.nii.gz").touch()
    return folder / "scan.nii.gz"


def text_named_nifti(folder):
    (folder / "scan.nii.gz").write_text("patient,label\n1,2\n")
    return folder / "scan.nii.gz"


def zipped_text_named_nifti(folder):
    (folder / "scan.nii.gz").write_bytes(gzip.compress(b"patient,label\n" * 100))
    return folder / "scan.nii.gz"


def truncated_gzip(folder):
    noise = np.random.default_rng(0).integers(0, 1000, (32, 32, 32), dtype=np.int16)
    path = save_nifti(folder / "scan.nii.gz", noise)
    path.write_bytes(path.read_bytes()[:-4000])
    return path


def damaged_gzip(folder):
    noise = np.random.default_rng(0).integers(0, 1000, (32, 32, 32), dtype=np.int16)
    path = save_nifti(folder / "scan.nii.gz", noise)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    return path


def truncated_nifti(folder):
    path = save_nifti(folder / "scan.nii", voxels())
    path.write_bytes(path.read_bytes()[:-100])
    return path


def time_series(folder):
    return save_nifti(folder / "scan.nii", voxels((*SHAPE, 7)))


def nifti_vectors(folder):
    return save_nifti(folder / "scan.nii", voxels((*SHAPE, 1, 3)))


def single_slice(folder):
    return save_nifti(folder / "scan.nii", voxels((14, 9, 1)))


def plane(folder):
    return save_nifti(folder / "scan.nii", voxels((14, 9)))


def not_a_number(folder):
    array = voxels().astype(np.float32)
    array[3, 4, :2] = np.nan
    array[0, 0, 0] = np.inf
    return save_nifti(folder / "scan.nii.gz", array)


def beyond_float32(folder):
    array = voxels().astype(np.float64)
    array[3:5, 0, 0] = 1e300, -1e300
    return save_nifti(folder / "scan.nii.gz", array)


def complex_numbers(folder):
    return save_nifti(folder / "scan.nii", voxels().astype(np.complex64))


def nifti_colours(folder):
    return save_nifti(folder / "scan.nii", np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))


def zero_spacing(folder):
    path = save_nifti(folder / "scan.nii", voxels(), np.eye(4))
    data = bytearray(path.read_bytes())
    struct.pack_into("<f", data, 76 + 4 * 2, 0.0)  # pixdim[2]
    struct.pack_into("<hh", data, 252, 0, 0)  # qform_code, sform_code
    path.write_bytes(data)
    return path


def singular_affine(folder):
    affine = np.eye(4)
    affine[:, 1] = affine[:, 0]
    path = save_nifti(folder / "scan.nii", voxels(), np.eye(4))
    data = bytearray(path.read_bytes())
    struct.pack_into("<hh", data, 252, 0, 2)
    struct.pack_into("<12f", data, 280, *affine[:3].ravel())
    path.write_bytes(data)
    return path


def affine_not_a_number(folder):
    path = singular_affine(folder)
    data = bytearray(path.read_bytes())
    struct.pack_into("<12f", data, 280, *(12 * [float("nan")]))
    path.write_bytes(data)
    return path


def patched(folder, offset, form, *values):
    path = save_nifti(folder / "scan.nii", voxels())
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, offset, *values)
    path.write_bytes(data)
    return path


def voxels_inside_the_header(folder):
    return patched(folder, 108, "<f", 0)  # vox_offset


def unknown_code_of_the_sform(folder):
    return patched(folder, 254, "<h", 9)


def unknown_code_of_the_qform(folder):
    return patched(folder, 252, "<h", 9)


def beyond_float32_when_scaled(folder):
    return patched(folder, 112, "<ff", 1e38, 0)  # scl_slope, scl_inter


def gzip_whose_voxels_changed(folder):
    path = folder / "scan.nii.gz"
    data = bytearray(gzip.compress(save_nifti(folder / "scan.nii", voxels()).read_bytes(), 0))  # bytes as they are
    data[900] ^= 0xFF
    path.write_bytes(data)
    return path


def gzip_cut_short_behind_the_voxels(folder):
    path = save_nifti(folder / "scan.nii.gz", voxels())
    path.write_bytes(path.read_bytes()[:-6])
    return path


def unknown_suffix(folder):
    (folder / "scan.png").write_bytes(b"\x89PNG")
    return folder / "scan.png"


def text_named_nrrd(folder):
    (folder / "scan.nrrd").write_text("patient,label\n1,2\n")
    return folder / "scan.nrrd"


def truncated_nrrd(folder):
    sitk.WriteImage(itk_image(voxels(), np.eye(4)), str(folder / "scan.nrrd"))
    path = folder / "scan.nrrd"
    path.write_bytes(path.read_bytes()[:-100])
    return path


def truncated_mha(folder):
    sitk.WriteImage(itk_image(voxels(), np.eye(4)), str(folder / "scan.mha"))
    path = folder / "scan.mha"
    path.write_bytes(path.read_bytes()[:-100])
    return path


def compressed_mha(folder, change=lambda packed: packed, **fields):
    """A MetaImage whose compressed voxels were changed, and likewise fields of its header."""
    path = folder / "scan.mha"
    sitk.WriteImage(itk_image(voxels(), np.eye(4)), str(path), useCompression=True)
    header, end, packed = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")
    for field, value in fields.items():
        header = re.sub(rf"{field} = .*\n".encode(), f"{field} = {value}\n".encode() if value else b"", header)
    path.write_bytes(header + end + change(packed))
    return path


def changed_compressed_mha(folder):
    return compressed_mha(
        folder, lambda packed: zlib.compress(voxels().tobytes(), 0)[:-1] + b"?", CompressedDataSize=1523
    )


def cut_compressed_mha(folder):
    return compressed_mha(folder, lambda packed: packed[:-30] + bytes(30))


def mha_of_which_a_part_is_compressed(folder):
    return compressed_mha(folder, CompressedDataSize=300)


def compressed_mha_of_no_size(folder):
    return compressed_mha(folder, CompressedDataSize=None)


def short_compressed_mha(folder):
    packed = zlib.compress(bytes(600))
    return compressed_mha(folder, lambda _: packed, CompressedDataSize=len(packed))


def itk_time_series(folder):
    frames = [itk_image(voxels(), np.eye(4))] * 5
    sitk.WriteImage(sitk.JoinSeries(frames), str(folder / "scan.nrrd"))
    return folder / "scan.nrrd"


def itk_colours(folder):
    piece = itk_image(voxels(), np.eye(4))
    sitk.WriteImage(sitk.Compose(piece, piece, piece), str(folder / "scan.mha"))
    return folder / "scan.mha"


def itk_plane(folder):
    sitk.WriteImage(itk_image(voxels(), np.eye(4))[:, :, 0], str(folder / "scan.mha"))
    return folder / "scan.mha"


def singular_mha(folder):
    path = folder / "scan.mha"
    sitk.WriteImage(itk_image(voxels(), np.eye(4)), str(path))
    path.write_bytes(re.sub(rb"TransformMatrix = .*", b"TransformMatrix = 1 0 0 1 0 0 0 0 1", path.read_bytes()))
    return path


def folder_without_scans(folder):
    (folder / "notes.txt").write_text("nothing here")
    return folder


def text_named_dicom(folder):
    (folder / "slice.dcm").write_text("nothing here")
    return folder / "slice.dcm"


def dicom_slice(folder):
    return next(write_dicom(folder / "series", voxels()[:, :, :1], np.eye(4)).iterdir())


def dicom_with_a_hole(folder):
    return write_dicom(folder / "series", voxels(), rotated_affine(), skip=(3,))


def dicom_repeated_positions(folder):
    series = write_dicom(folder / "series", voxels(), rotated_affine())
    for path in list(series.iterdir())[:3]:
        (series / f"again-{path.name}").write_bytes(path.read_bytes())
    return series


def dicom_two_series(folder):
    write_dicom(folder / "series", voxels(), rotated_affine(), description="arterial")
    return write_dicom(folder / "series", voxels(), np.eye(4), uid="1.2.9", description="venous", modality="MR")


BROKEN = {
    missing: "no such file",
    empty: "is empty",
    text_named_nifti: "cannot be read as NIfTI",
    zipped_text_named_nifti: "cannot be read as NIfTI",
    truncated_gzip: "cannot be read as NIfTI",
    damaged_gzip: "cannot be read as NIfTI",
    truncated_nifti: "cannot be read as NIfTI",
    time_series: "7 frames .* split it",
    nifti_vectors: "holds vectors",
    single_slice: "single slice",
    plane: "2 axes .* 3-D scan",
    not_a_number: "3 of 756 voxels are NaN or infinite",
    beyond_float32: "2 of 756 voxels are NaN or infinite",
    complex_numbers: "complex numbers",
    nifti_colours: "colours",
    zero_spacing: "voxel spacing 1 x 0 x 1 mm",
    singular_affine: "singular",
    affine_not_a_number: "not usable",
    voxels_inside_the_header: "voxels start inside of the header",
    unknown_code_of_the_sform: "its sform_code is 9, which NIfTI does not have; correct",
    unknown_code_of_the_qform: "its qform_code is 9",
    beyond_float32_when_scaled: "752 of 756 voxels are NaN or infinite",
    gzip_whose_voxels_changed: "cannot be read as NIfTI .*CRC",
    gzip_cut_short_behind_the_voxels: "cannot be read as NIfTI",
    unknown_suffix: r"ends in \.nii",
    text_named_nrrd: "cannot be read as NRRD",
    truncated_nrrd: "cannot be read as NRRD",
    truncated_mha: "cannot be read as MetaImage",
    changed_compressed_mha: "compressed voxels are damaged",
    cut_compressed_mha: "compressed voxels are damaged",
    mha_of_which_a_part_is_compressed: "compressed voxels are damaged",
    compressed_mha_of_no_size: "compressed voxels are damaged",
    short_compressed_mha: "not as long as the header",
    itk_time_series: "5 frames .* split it",
    itk_colours: "3 values a voxel",
    itk_plane: "2 axes .* 3-D scan",
    singular_mha: r"MetaImage \(Bad direction, determinant is 0",
    folder_without_scans: "no DICOM files",
    text_named_dicom: "cannot be read as DICOM",
    dicom_slice: "single slice",
    dicom_with_a_hole: r"6 mm after .* 3 mm elsewhere",
    dicom_repeated_positions: "same position",
    dicom_two_series: r"2 series.*arterial, CT, 6 files.*venous, MR, 6 files",
}


@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)
def test_broken_scan_is_one_sentence(tmp_path, make, capfd, caplog):
    path = make(tmp_path)
    capfd.readouterr()
    caplog.clear()
    with pytest.raises(ScanError) as caught:
        load_volume(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert re.search(BROKEN[make], message), message
    assert not caplog.records
    if "mha" not in make.__name__:  # the MetaImage library prints past ITK's switch
        assert "".join(capfd.readouterr()) == ""


def test_what_nibabel_corrects_in_a_header_is_not_printed(tmp_path, caplog):
    path = patched(tmp_path, 80, "<f", -0.8)  # pixdim[1]
    assert load_volume(path).spacing == pytest.approx(SPACING)
    assert nifti_header(path)["pixdim"][1] == pytest.approx(0.8)
    assert not caplog.records


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
def test_scan_whose_name_is_no_text(tmp_path, suffix):
    path = tmp_path / os.fsdecode(b"\xff" + suffix.encode())
    sitk.WriteImage(itk_image(voxels(), rotated_affine()), str(tmp_path / f"scan{suffix}"))
    (tmp_path / f"scan{suffix}").rename(path)
    # In a process of its own, which SimpleITK would end.
    code = "import sys; from medmim.volumes import load_volume; print(load_volume(sys.argv[1]).spacing)"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    if suffix == ".nii":
        assert (done.returncode, done.stdout.count(",")) == (0, 2)
    else:
        assert done.returncode == 1
        assert re.search(r"ScanError: .*udcff.*: its path is not text in UTF-8", done.stderr)


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha", ".dcm"])
def test_scan_that_may_not_be_read_is_refused(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(b"some")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ScanError, match=r"scan.*: cannot be read"):
        load_volume(path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_voxel_that_is_no_number_is_enough(dtype, value):
    array = np.ones((1, *SHAPE), dtype)
    Volume(array, np.eye(4))
    array[0, 1, 2, 3] = value
    with pytest.raises(ScanError, match="1 of 756 voxels"):
        Volume(array, np.eye(4))


def test_volume_made_by_hand_is_checked():
    with pytest.raises(ScanError, match=r"^this volume: has 2 axes beside the channels \(shape 4 x 5 x 6\)"):
        Volume(np.zeros((4, 5, 6)), np.eye(4))
    with pytest.raises(ScanError, match=r"the affine is 3 x 4; give \(4, 4\)"):
        Volume(np.zeros((1, 4, 5, 6)), np.eye(4)[:3])


def test_import_is_light():
    code = "import sys, medmim.volumes; print({'torch', 'SimpleITK', 'nibabel', 'monai'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
