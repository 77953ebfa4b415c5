"""Names of many scans: unique, and the same for the same scans."""

from pathlib import Path

import pytest

from medmim.cohort import ScanTable, name_scans, place_files
from medmim.errors import OutputError, ScanError, SpecError


def scan(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM")
    return path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a/x.nii.gz", "b/y.nii.gz"], ["x", "y"]),
        (["siteA/CT.nii.gz", "siteB/CT.nii.gz"], ["siteA/CT", "siteB/CT"]),
        (["siteA/CT.nii.gz", "siteB/ct.nii"], ["siteA/CT", "siteB/ct"]),  # one name on some file systems
        (["a/one/CT.nii.gz", "b/one/CT.nii.gz", "c/CT.nrrd"], ["a/one/CT", "b/one/CT", "c/CT"]),
        (["a/x.nii.gz", "a/x.nrrd"], ["x.nii.gz", "x.nrrd"]),
        (["a/x.nii.gz", "a/x.nrrd", "b/x.mha"], ["x.nii.gz", "x.nrrd", "x"]),
        (["a", "b"], ["a/CT", "inner/CT", "b/CT"]),
        (["siteA/series", "siteB/series"], ["siteA/series", "siteB/series"]),
    ],
)
def test_names_are_unique_and_the_same_again(tmp_path, monkeypatch, given, expected):
    for name in given:
        if name in ("a", "b"):
            scan(tmp_path / name / "CT.nii.gz")
        elif name.endswith("series"):
            scan(tmp_path / name / "1.dcm")
        else:
            scan(tmp_path / name)
    if "a" in given:
        scan(tmp_path / "a" / "inner" / "CT.nii.gz")
    paths = [tmp_path / name for name in given]
    named = name_scans(paths)
    assert sorted(named) == sorted(expected)
    assert name_scans(reversed(paths)) == named
    monkeypatch.chdir(tmp_path)
    assert list(name_scans(map(Path, given))) == list(named)


def test_a_scan_given_twice_is_refused_however_it_is_spelled(tmp_path, monkeypatch):
    path = scan(tmp_path / "a" / "x.nii.gz")
    monkeypatch.chdir(tmp_path / "a")
    for other in (path, tmp_path / "a", Path("x.nii.gz"), Path("../a/x.nii.gz")):
        with pytest.raises(ScanError, match=r"x\.nii\.gz: given twice; leave one out"):
            name_scans([path, other])


@pytest.mark.parametrize(
    "given", [["CT.nii.gz", "ct.nii.gz", "x.nii"], ["siteA/CT.nii", "sitea/CT.nii"], ["x.nii", "x.nii.gz", "x.nii.mha"]]
)
def test_scans_that_no_folder_tells_apart_are_refused(tmp_path, given):
    paths = [scan(tmp_path / name) for name in given]
    if len(set(tmp_path.rglob("*.*"))) < len(given):
        pytest.skip("this file system takes capitals for small letters")
    with pytest.raises(ScanError, match=r"would be called as those of .* on some file systems at least; rename one"):
        name_scans(paths)


def test_the_folder_above_has_a_name_too(tmp_path, monkeypatch):
    scan(tmp_path / "series" / "1.dcm")
    (tmp_path / "series" / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "series" / "inner")
    assert list(name_scans([Path("..")])) == ["series"]


def test_a_name_that_is_no_text_is_written_in_ascii(tmp_path):
    named = name_scans([scan(tmp_path / "a\udcff\n.nii.gz")])
    assert list(named) == ["a\\udcff\\n"]
    table = ScanTable(tmp_path / "t.csv", ["x"], model="m")
    table.add(*next(iter(named.items())), [1])
    assert ScanTable(tmp_path / "t.csv", ["x"], model="m").without_row(named) == {}


def test_a_place_that_cannot_be_written_is_found_before(tmp_path):
    named = {"inner/x": scan(tmp_path / "x.nii.gz")}
    (tmp_path / "out" / "inner" / "x.nii.gz").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"x\.nii\.gz: cannot be written \(a folder has that name\)"):
        place_files(named, tmp_path / "out", ".nii.gz")
    scan(tmp_path / "other" / "inner")
    with pytest.raises(OutputError, match=r"cannot be written \(Not a directory\); choose another output"):
        place_files(named, tmp_path / "other", ".nii.gz")


def test_a_row_without_a_model_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("scan,x,file,model\na,1\n")
    with pytest.raises(SpecError, match="has rows of another model, without a name, and this is m;"):
        ScanTable(tmp_path / "t.csv", ["x"], model="m")


def test_classes_that_are_called_as_other_columns_keep_their_numbers(tmp_path):
    columns, image = ("scan", "model", "x"), tmp_path / "a.nii.gz"
    ScanTable(tmp_path / "t.csv", columns, model="m").add("a", image, (0.1, 0.2, 0.7))
    table = ScanTable(tmp_path / "t.csv", columns, model="m")
    assert table.header == ["scan", "class scan", "class model", "x", "file", "model"]
    assert table.rows == {"a": ["0.1", "0.2", "0.7", str(image), "m"]}
    assert not table.without_row({"a": image})
