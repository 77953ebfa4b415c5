"""Labels of whole scans: the same as without windows, and where the scan is, whatever its axes and voxels."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

import medmim
from fakes import TINY, tiny_model
from medmim.classification import classify
from medmim.errors import ScanError, SpecError
from medmim.identity import identity
from medmim.segmentation import read_segmentation, segment
from medmim.spec import VolumeSpec
from medmim.tasks import encoder_of
from medmim.volumes import Volume
from segmenters import CLASSES, VOLUME, Thresholds
from synthetic import write_scan

THIN = {"unetr": {"feature_size": 2}, "light": {"width": 2}}


# --- geometry ---------------------------------------------------------------------------------------------------------


def head(points: np.ndarray) -> np.ndarray:
    """A lopsided body at points in mm (..., 3): 0 outside, 500 in the rim, 1000 in a core to the right and front."""
    rim = ((points / (36, 46, 40)) ** 2).sum(-1) < 1
    core = (((points - (12, 16, -8)) / (13, 17, 15)) ** 2).sum(-1) < 1
    return np.where(core, 1000, np.where(rim, 500, 0)).astype(np.int16)


def grid_of(axcodes: str, spacing: tuple[float, ...], turn: float = 0.0):
    """Voxels over the body with these axes: the array and its affine."""
    order = nib.orientations.axcodes2ornt(axcodes)
    matrix = np.zeros((3, 3))
    for column, (axis, sign) in enumerate(order):
        matrix[int(axis), column] = sign * spacing[column]
    c, s = np.cos(turn), np.sin(turn)
    matrix = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ matrix
    shape = np.ceil(110 / np.array(spacing)).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = -matrix @ ((shape - 1) / 2) + (1.5, -2, 3)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return head(index @ affine[:3, :3].T + affine[:3, 3]), affine


@pytest.mark.parametrize(
    ("axcodes", "spacing", "turn"),
    [
        ("RAS", (2.0, 2.0, 2.0), 0.0),
        ("LPS", (1.7, 2.4, 3.0), 0.0),
        ("SLA", (4.0, 1.5, 2.0), 0.0),
        ("PIR", (2.0, 2.5, 3.0), 0.2),
    ],
)
@pytest.mark.parametrize("network_spacing", [None, (2.0, 2.0, 2.5)])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_the_mask_lies_on_the_scan(tmp_path, axcodes, spacing, turn, network_spacing, suffix):
    array, affine = grid_of(axcodes, spacing, turn)
    scan, written = tmp_path / f"scan{suffix}", tmp_path / "mask.nii.gz"
    nib.Nifti1Image(array, affine).to_filename(tmp_path / "scan.nii.gz")
    if suffix != ".nii.gz":
        sitk.WriteImage(sitk.ReadImage(str(tmp_path / "scan.nii.gz")), str(scan))
    volume = VOLUME.model_copy(update={"spacing": network_spacing})
    result = segment(Thresholds(), scan, volume=volume)
    result.save(written)

    by_nibabel, by_itk, scan_by_itk = nib.load(written), sitk.ReadImage(str(written)), sitk.ReadImage(str(scan))
    np.testing.assert_allclose(by_nibabel.affine, affine, atol=1e-4)
    np.testing.assert_allclose(by_nibabel.get_qform(), affine, atol=1e-4)
    assert by_nibabel.get_data_dtype() == np.uint8
    for mine, theirs in zip(
        (by_itk.GetSize(), by_itk.GetSpacing(), by_itk.GetOrigin(), by_itk.GetDirection()),
        (scan_by_itk.GetSize(), scan_by_itk.GetSpacing(), scan_by_itk.GetOrigin(), scan_by_itk.GetDirection()),
        strict=True,
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)

    labels = np.asarray(by_nibabel.dataobj)
    np.testing.assert_array_equal(labels, sitk.GetArrayFromImage(by_itk).T)
    truth = array // 500
    if network_spacing is None:
        np.testing.assert_array_equal(labels, truth)  # nothing was resampled
    for label in (1, 2):
        ours, theirs = labels == label, truth == label
        assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) > 0.88
    voxel = np.prod(spacing) / 1000
    assert result.millilitres == pytest.approx(
        {"rim": (labels == 1).sum() * voxel, "core": (labels == 2).sum() * voxel}
    )
    assert read_segmentation(written, CLASSES).millilitres == pytest.approx(result.millilitres)
    assert result.millilitres["core"] == pytest.approx(4 / 3 * np.pi * 13 * 17 * 15 / 1000, rel=0.05)


A, B = grid_of("PIR", (2.0, 2.5, 3.0), 0.2)[1], grid_of("PIR", (2.0, 2.5, 3.0), -0.1)[1]
SHEARED = A @ np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("sform", "qform", "codes"),
    [
        (A, A, (1, 1)),
        (A, B, (2, 1)),
        (A, B, (1, 2)),
        (A, B, (0, 1)),
        (A, B, (1, 0)),
        (A, B, (0, 0)),
        (SHEARED, A, (1, 1)),
    ],
)
@pytest.mark.parametrize("frames", [(), (1,)])
def test_the_mask_has_both_forms_of_the_geometry_of_a_nifti_scan(tmp_path, sform, qform, codes, frames):
    """ITK reads the qform where nibabel reads the sform, so one of them for both would misplace the mask in ITK."""
    array = grid_of("PIR", (2.0, 2.5, 3.0))[0]
    image = nib.Nifti1Image(array.reshape(*array.shape, *frames), None)
    image.set_sform(sform, codes[0])
    image.set_qform(qform, codes[1])
    image.to_filename(tmp_path / "scan.nii.gz")
    segment(Thresholds(), tmp_path / "scan.nii.gz", volume=VOLUME).save(tmp_path / "mask.nii.gz")
    scan, mask = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), array // 500)
    np.testing.assert_array_equal(mask.affine, scan.affine)
    for form in ("get_sform", "get_qform"):
        (mine, my_code), (theirs, their_code) = (getattr(each, form)(coded=True) for each in (mask, scan))
        assert my_code == their_code
        np.testing.assert_array_equal(mine, theirs)
    scan, mask = sitk.ReadImage(str(tmp_path / "scan.nii.gz")), sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
    assert scan.GetDimension() == 3
    for part in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, part)(), getattr(scan, part)(), rtol=1e-6)


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1000), ("micron", 0.001)])
def test_the_mask_of_a_scan_in_another_unit_has_that_unit(tmp_path, unit, mm):
    write_scan(tmp_path / "scan.nii", (20, 24, 22), spacing=(2 / mm, 2 / mm, 3 / mm))
    scan = nib.load(tmp_path / "scan.nii")
    scan.header.set_xyzt_units(unit)
    scan.to_filename(tmp_path / "scan.nii.gz")
    result = segment(Thresholds().eval(), tmp_path / "scan.nii.gz")
    result.save(tmp_path / "mask.nii.gz")
    assert sum(result.millilitres.values()) == pytest.approx(np.count_nonzero(result.labels) * 12 / 1000)
    written = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(written.affine, scan.affine)
    sizes = [sitk.ReadImage(str(tmp_path / name)).GetSpacing() for name in ("scan.nii.gz", "mask.nii.gz")]
    assert sizes[0] == sizes[1] == pytest.approx((2, 2, 3))
    again = read_segmentation(tmp_path / "mask.nii.gz", CLASSES, scan=tmp_path / "scan.nii.gz")
    np.testing.assert_allclose(again.affine, result.affine)


def test_a_volume_in_memory_is_segmented_too():
    array, affine = grid_of("RAS", (2.0, 2.0, 2.0))
    labels = segment(Thresholds(), Volume(array[None], affine)).labels
    np.testing.assert_array_equal(labels, array // 500)


def test_models_of_another_kind_are_refused():
    with pytest.raises(SpecError, match="vit_t_mae3d does not segment; `medmim-train finetune`"):
        segment(tiny_model(), "scan.nii.gz")
    for model in (tiny_model(), Thresholds()):
        with pytest.raises(SpecError, match="vit_t_mae3d does not classify; `medmim-train finetune`"):
            classify(model, "scan.nii.gz")
    with pytest.raises(SpecError, match=r"vit_t_mae3d has a single output, .*; use two classes or more"):
        classify(tiny_model(num_classes=1), "scan.nii.gz")
    model = tiny_model(num_classes=2)
    medmim.name_classes(model, ("no", "yes"))
    model.reset_classifier(3)
    with pytest.raises(SpecError, match="vit_t_mae3d has 3 outputs, its task names 2; use name_classes"):
        classify(model, "scan.nii.gz")


def test_a_compiled_model_does_what_the_model_does(tmp_path):
    scan = Volume(grid_of("RAS", (2.0, 2.0, 2.0))[0][None], np.eye(4))
    model = medmim.create_segmenter("vit_t_mae3d", "light", num_classes=2, decoder_args=THIN["light"], **TINY["vit"])
    compiled = torch.compile(model, backend="eager")
    assert identity(compiled) == identity(model)
    expected, result = (segment(each, scan, volume=VOLUME) for each in (model, compiled))
    np.testing.assert_array_equal(result.labels, expected.labels)
    expected, result = (medmim.embed(each, scan, volume=VOLUME).pooled for each in (model, compiled))
    torch.testing.assert_close(result, expected)
    medmim.save_pretrained(compiled, tmp_path)
    assert identity(medmim.from_pretrained(tmp_path)) == identity(model)
    with pytest.raises(SpecError, match="does not classify"):
        classify(compiled, scan)
    medmim.export_model(compiled, tmp_path / "model.pt2", to="torch-export")
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.rand(1, model.in_chans, *model.img_size)
    torch.testing.assert_close(program(x), model.eval()(x))
    medmim.name_classes(compiled, ("background", "lesion"))
    assert model.spec.task.kind == "segmentation"
    assert encoder_of(compiled) is model.encoder


# --- classification ---------------------------------------------------------------------------------------------------


def test_probabilities_are_the_softmax_of_the_prepared_scan(tmp_path):
    write_scan(tmp_path / "scan.nii.gz")
    model = tiny_model(num_classes=3)
    x = medmim.create_transform(model, volume=VOLUME)(tmp_path / "scan.nii.gz").as_tensor()
    expected = model.eval()(x[None]).softmax(dim=1)[0].tolist()
    probabilities = classify(model, tmp_path / "scan.nii.gz", volume=VOLUME)
    assert probabilities == pytest.approx(dict(zip(("class 0", "class 1", "class 2"), expected, strict=True)))
    medmim.name_classes(model, CLASSES, volume=VOLUME)
    assert list(classify(model, tmp_path / "scan.nii.gz")) == list(CLASSES)
    assert sum(probabilities.values()) == pytest.approx(1)


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def segmenter(tmp_path):
    torch.manual_seed(0)
    model = medmim.create_segmenter("vit_t_mae3d", "light", classes=CLASSES, decoder_args=THIN["light"], **TINY["vit"])
    medmim.name_classes(model, CLASSES, volume=VOLUME)
    medmim.save_pretrained(model, tmp_path / "segmenter")
    return f"local-dir:{tmp_path / 'segmenter'}"


@pytest.fixture
def classifier(tmp_path):
    model = tiny_model(num_classes=2)
    medmim.name_classes(model, ("benign", "malignant"), volume=VOLUME)
    medmim.save_pretrained(model, tmp_path / "classifier")
    return f"local-dir:{tmp_path / 'classifier'}"


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    (folder / "inner").mkdir(parents=True)
    write_scan(folder / "a.nii.gz", seed=1)
    write_scan(folder / "inner" / "a.nii", seed=2, shape=(20, 50, 33), spacing=(1.0, 2.0, 3.0))
    (folder / "broken.nrrd").touch()
    return folder


def rows(path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_segment_a_folder_then_again(call, segmenter, scans):
    output = scans / "masks"
    code, out, err = call("segment", scans, "-m", segmenter, "-o", output)
    assert (code, out) == (1, f"{output}: 2 of 3 scans\n")
    assert err == f"medmim: error: {scans / 'broken.nrrd'}: the file is empty; copy or export it again\n"
    assert sorted(str(p.relative_to(output)) for p in output.rglob("*.*")) == [
        "a.nii.gz",
        "inner/a.nii.gz",
        "volumes.csv",
    ]
    header, *body = rows(output / "volumes.csv")
    assert header == ["scan", "rim (ml)", "core (ml)", "file", "model"]
    assert [row[3] for row in body] == [str(scans / "a.nii.gz"), str(scans / "inner" / "a.nii")]
    assert re.fullmatch(r"vit_t_mae3d sha256:[0-9a-f]{16}", body[0][4])
    assert [row[0] for row in body] == ["a", "inner/a"]
    written, scan = nib.load(output / "inner" / "a.nii.gz"), nib.load(scans / "inner" / "a.nii")
    np.testing.assert_allclose(written.affine, scan.affine)
    assert written.shape == scan.shape
    counts = np.bincount(np.asarray(written.dataobj).ravel(), minlength=3)
    assert [float(v) for v in body[1][1:3]] == pytest.approx(counts[1:] * 6 / 1000, rel=1e-4)

    (scans / "broken.nrrd").unlink()
    before = (output / "a.nii.gz").stat().st_mtime_ns, (output / "volumes.csv").read_text()
    code, out, err = call("segment", scans, "-m", segmenter, "-o", output)
    assert (code, out, err) == (0, f"{output}: 0 of 0 scans, 2 were there already\n", "")
    assert before == ((output / "a.nii.gz").stat().st_mtime_ns, (output / "volumes.csv").read_text())

    (output / "volumes.csv").unlink()  # what is missing comes from the masks
    (output / "inner" / "a.nii.gz").unlink()
    code, out, _ = call("segment", scans, "-m", segmenter, "-o", output)
    assert (code, out) == (0, f"{output}: 2 of 2 scans\n")
    assert (output / "volumes.csv").read_text() == before[1]


def test_a_scan_is_never_taken_for_a_mask(call, segmenter, scans, tmp_path, monkeypatch):
    (scans / "broken.nrrd").unlink()
    monkeypatch.chdir(scans)
    link = tmp_path / "link"
    link.symlink_to(scans)
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        ((scans / "a.nii.gz", "-o", scans), f"{scans / 'a.nii.gz'}: is a scan"),
        ((scans / "a.nii.gz", "-o", link), f"{link / 'a.nii.gz'}: is a scan"),
        (("a.nii.gz", "-o", "."), "a.nii.gz: is a scan, and the output would go there; choose another one than ."),
        ((scans, "-o", scans), f"{scans}: is or holds the folder of scans {scans}; choose an output of its own"),
        ((scans / "inner", "-o", "."), ".: is or holds the folder of scans"),
        ((link, "-o", tmp_path), f"{tmp_path}: is or holds the folder of scans {link}"),
    ):
        code, out, err = call("segment", *arguments, "-m", segmenter)
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert err.startswith(f"medmim: error: {message}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mask_that_is_none_is_reported_and_the_others_go_on(call, segmenter, scans):
    (scans / "broken.nrrd").unlink()
    masks = scans / "masks"
    masks.mkdir()
    shutil.copy(scans / "a.nii.gz", masks)
    code, out, err = call("segment", scans, "-m", segmenter, "-o", masks)
    assert (code, out) == (1, f"{masks}: 1 of 2 scans\n")
    cure = "delete it, and segment the scan again"
    assert err == f"medmim: error: {masks / 'a.nii.gz'}: its values are not the labels 0 to 2 of a mask; {cure}\n"
    assert [row[0] for row in rows(masks / "volumes.csv")] == ["scan", "inner/a"]

    save_labels(masks / "a.nii.gz", np.zeros((5, 6, 7), np.uint8))
    _, _, err = call("segment", scans, "-m", segmenter, "-o", masks)
    assert f"{masks / 'a.nii.gz'}: has 5 x 6 x 7 voxels, and the scan 40 x 44 x 48; {cure}" in err
    (masks / "a.nii.gz").write_bytes(b"no NIfTI")
    code, _, err = call("segment", scans, "-m", segmenter, "-o", masks)
    assert (code, len(err.splitlines())) == (1, 1)
    assert err.endswith(f", or {cure}\n")

    (masks / "volumes.csv").write_bytes(b"\xff\xfe\x00")
    code, out, err = call("segment", scans, "-m", segmenter, "-o", masks)
    assert (code, out) == (1, "")
    assert f"{masks / 'volumes.csv'}: not readable as CSV in UTF-8; choose another output" in err


def save_labels(path, labels) -> None:
    nib.Nifti1Image(labels, np.eye(4)).to_filename(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_masks_of_other_programs_are_read_by_their_values(tmp_path, dtype):
    labels = np.zeros((4, 5, 6), dtype)
    labels[1, 2] = 2
    save_labels(tmp_path / "mask.nii.gz", labels)
    assert read_segmentation(tmp_path / "mask.nii.gz", CLASSES).millilitres == pytest.approx({"rim": 0, "core": 0.006})
    with pytest.raises(ScanError, match="not the labels 0 to 1"):
        read_segmentation(tmp_path / "mask.nii.gz", CLASSES[:2])
    save_labels(tmp_path / "mask.nii.gz", labels - 0.5)
    with pytest.raises(ScanError, match="not the labels"):
        read_segmentation(tmp_path / "mask.nii.gz", CLASSES)


def test_classify_files_then_again(call, classifier, scans, tmp_path):
    output = tmp_path / "classes.csv"
    code, out, err = call("classify", scans / "a.nii.gz", scans / "broken.nrrd", "-m", classifier, "-o", output)
    assert (code, out) == (1, f"{output}: 1 of 2 scans\n")
    assert len(err.splitlines()) == 1
    before = rows(output)
    assert before[0] == ["scan", "benign", "malignant", "file", "model"]
    assert sum(map(float, before[1][1:3])) == pytest.approx(1, abs=1e-5)
    (scans / "broken.nrrd").unlink()
    code, out, _ = call("classify", scans, "-m", classifier, "-o", output)
    assert (code, out) == (0, f"{output}: 1 of 1 scans, 1 were there already\n")
    assert rows(output)[:2] == before
    assert rows(output)[2][0] == "inner/a"


def test_what_cannot_go_on_is_one_line(call, segmenter, classifier, scans, tmp_path):
    def error(*arguments):
        code, out, err = call(*arguments)
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        return err

    table = tmp_path / "classes.csv"
    table.write_text("scan,other\n")
    assert "as of another model" in error("classify", scans, "-m", classifier, "-o", table)
    assert table.read_text() == "scan,other\n"
    assert "does not segment" in error("segment", scans, "-m", classifier, "-o", tmp_path / "masks")
    assert "does not classify" in error("classify", scans, "-m", segmenter, "-o", tmp_path / "new.csv")
    assert "no such folder" in error("segment", scans, "-m", "local-dir:nowhere", "-o", tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def other_model(folder) -> str:
    """A segmenter of the same name and classes as the fixture's, with other weights."""
    torch.manual_seed(1)
    model = medmim.create_segmenter("vit_t_mae3d", "light", classes=CLASSES, decoder_args=THIN["light"], **TINY["vit"])
    medmim.name_classes(model, CLASSES, volume=VOLUME)
    medmim.save_pretrained(model, folder)
    return f"local-dir:{folder}"


def test_segment_takes_nothing_of_another_model_for_done(call, segmenter, scans, tmp_path):
    scan, output, other = scans / "a.nii.gz", tmp_path / "masks", other_model(tmp_path / "other")
    assert call("segment", scan, "-m", segmenter, "-o", output)[0] == 0
    before = {path: path.read_bytes() for path in output.iterdir()}
    for added in (scan, scans / "inner"):  # neither the same scan nor another one
        code, out, err = call("segment", added, "-m", other, "-o", output)
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert re.search(
            r"volumes\.csv: has rows of another model, (\S+ sha256:\w{16}), and this is (?!\1)\S+ sha256:\w{16}; "
            "choose another output, or delete what is there",
            err,
        )
        assert before == {path: path.read_bytes() for path in output.iterdir()}
    code, _, err = call("segment", scan, "-m", segmenter, "-o", output, "--modality", "mr")  # as which it may differ
    assert code == 1
    assert re.search(r"another model, (\S+ sha256:\w{16}), and this is \1 for MR; choose another output", err)
    (output / "volumes.csv").unlink()  # the mask says of which model it is
    code, out, err = call("segment", scan, "-m", other, "-o", output)
    assert (code, out) == (1, f"{output}: 0 of 1 scans\n")
    assert re.search(r"a\.nii\.gz: does not say that it is of vit_t_mae3d sha256:\w{16}; choose another output", err)
    assert call("segment", scan, "-m", segmenter, "-o", output)[0] == 0
    assert before == {path: path.read_bytes() for path in output.iterdir()}


def test_classify_takes_no_row_of_another_model_for_done(call, classifier, scans, tmp_path):
    output = tmp_path / "classes.csv"
    assert call("classify", scans / "a.nii.gz", "-m", classifier, "-o", output)[0] == 0
    before = output.read_bytes()
    torch.manual_seed(1)
    model = tiny_model(num_classes=2)
    torch.nn.init.normal_(model.get_classifier().weight)
    medmim.name_classes(model, ("benign", "malignant"), volume=VOLUME)
    medmim.save_pretrained(model, tmp_path / "other")
    code, out, err = call("classify", scans / "a.nii.gz", "-m", f"local-dir:{tmp_path / 'other'}", "-o", output)
    assert (code, out) == (1, "")
    assert "classes.csv: has rows of another model" in err
    output.write_bytes(b"\xef\xbb\xbf" + before)  # saved again by a spreadsheet
    code, out, _ = call("classify", scans / "a.nii.gz", "-m", classifier, "-o", output)
    assert (code, out) == (0, f"{output}: 0 of 0 scans, 1 were there already\n")


def test_scans_of_one_name_are_never_taken_for_each_other(call, segmenter, tmp_path):
    for site, shape in (("siteA", (20, 30, 20)), ("siteB", (20, 20, 30))):
        (tmp_path / site).mkdir()
        write_scan(tmp_path / site / "CT.nii.gz", shape)
    scans, output = [tmp_path / site / "CT.nii.gz" for site in ("siteA", "siteB")], tmp_path / "masks"
    for expected in (f"{output}: 2 of 2 scans\n", f"{output}: 0 of 0 scans, 2 were there already\n"):
        assert call("segment", *scans, "-m", segmenter, "-o", output)[:2] == (0, expected)
        assert [row[0] for row in rows(output / "volumes.csv")[1:]] == ["siteA/CT", "siteB/CT"]
    shapes = [nib.load(output / site / "CT.nii.gz").shape for site in ("siteA", "siteB")]
    assert shapes == [(20, 30, 20), (20, 20, 30)]

    output = tmp_path / "one by one"
    assert call("segment", scans[0], "-m", segmenter, "-o", output)[0] == 0
    code, out, err = call("segment", scans[1], "-m", segmenter, "-o", output)
    assert (code, out) == (1, "")
    assert f"its row CT is of another scan, {scans[0]}, and not of {scans[1]}; choose another output" in err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_segment_512_x_512_x_600_in_bounded_memory(tmp_path):
    """The interpreter takes 0.8 GB, the scan 0.3 GB, in float32 0.6 GB, a band of scores 0.5 GB."""
    volume = VolumeSpec.parse({"intensity": {"CT": {"kind": "window", "low": -1000, "high": 1000}}}, source="test")
    model = medmim.create_segmenter(
        "vit_t_mae3d", "linear", num_classes=3, volume=volume, img_size=(128, 128, 128), patch_size=(32, 32, 32),
        embed_dim=24, depth=1, num_heads=2,
    )  # fmt: skip
    medmim.save_pretrained(model, tmp_path / "model")
    voxels = np.full((512, 512, 600), -1000, dtype=np.int16, order="F")
    voxels[60:450, 100:400] = (np.sin(np.linspace(0, 40, 600)) * 300).astype(np.int16)
    nib.Nifti1Image(voxels, np.diag([0.7, 0.7, 0.8, 1])).to_filename(tmp_path / "scan.nii")
    script = (
        "import resource; from medmim.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    arguments = [
        "segment",
        str(tmp_path / "scan.nii"),
        "-o",
        str(tmp_path / "out"),
        "-m",
        f"local-dir:{tmp_path}/model",
    ]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    print(done.stdout)
    assert nib.load(tmp_path / "out" / "scan.nii.gz").shape == (512, 512, 600)
    assert int(re.search(r"peak (\d+)", done.stdout)[1]) < 5 * 2**20  # in KiB
