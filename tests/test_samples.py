"""The sample scans are there, are what their README says, and stay small."""

import hashlib
import re

import numpy as np
import pytest

from medmim import samples
from medmim.errors import ScanError
from medmim.samples import sample_scans
from medmim.volumes import load_volume

FOLDER = sample_scans()[0].path.parent
README = (FOLDER / "README.md").read_text()
LABELLED = [scan for scan in sample_scans() if scan.labels]


@pytest.mark.parametrize("scan", sample_scans(), ids=lambda scan: scan.name)
def test_each_scan_can_be_read_and_has_its_licence_beside_it(scan):
    volume = load_volume(scan.path)
    assert volume.orientation == "RAS"
    assert (volume.array.min() < -900) == (scan.modality == "CT")
    licence = (FOLDER / f"LICENSE-{scan.name}.txt").read_text()
    assert f"{scan.name}.nii.gz" in licence
    assert f"LICENSE-{scan.name}.txt" in README


@pytest.mark.parametrize("scan", LABELLED, ids=lambda scan: scan.name)
def test_labels_lie_on_their_scan(scan):
    volume, labels = load_volume(scan.path), load_volume(scan.labels)
    assert labels.array.shape == volume.array.shape
    np.testing.assert_allclose(labels.affine, volume.affine)
    assert np.unique(labels.array).tolist() == list(range(len(scan.classes)))


def test_labels_are_of_a_scan():
    assert {path.name for path in FOLDER.glob("*.nii.gz")} == {
        path.name for scan in sample_scans() for path in (scan.path, scan.labels) if path
    }


def test_readme_lists_every_file_with_its_digest():
    rows = dict(re.findall(r"^\| `(\S+\.nii\.gz)` \|.*\| `([0-9a-f]{64})` \|$", README, re.MULTILINE))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.glob("*.nii.gz")}
    assert rows == files


def test_they_are_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 2_500_000


def test_found_in_an_installed_wheel_too(tmp_path, monkeypatch):
    for scan in sample_scans():
        (tmp_path / scan.path.name).write_bytes(b"")
    monkeypatch.setattr(samples, "FOLDERS", (tmp_path / "nowhere", tmp_path))
    assert {scan.path.parent for scan in sample_scans()} == {tmp_path}


def test_without_them_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "FOLDERS", (tmp_path,))
    with pytest.raises(ScanError, match="install medmim again"):
        sample_scans()
