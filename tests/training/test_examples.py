"""Each example runs as it stands, in a tiny setting, and prints what it promises; notebooks are their scripts."""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
PRINTED = {
    "quickstart": r"patches: \(192, 7, 8, 6\)[^$]*saved, loaded and the same: True",
    "nearest_neighbours": r"pretrained: rank correlation [\d.-]+, (chest_ct \d(, )?){9}$",
    "segmentation": r"before: Dice of white matter [\d.]+[^$]*after: Dice of white matter [\d.]+$",
    "classification": r"pretrained weights: [\d.]+ right before, [\d.]+ after[^$]*'right': [\d.]+",
    "own_folder": r"left out: .*broken\.nii\.gz[^$]*^ +brain\.nii\.gz 1\.0000 (1\.0000|0\.9999)$",
    "continue_pretraining": r"^before: brain_t1 [\d.]+[^$]*^after: brain_t1 [\d.]+",
    "monai_pipeline": r"^Dice before: bone [\d.]+[^$]*^Dice after: bone [\d.]+ lung [\d.]+ other tissue [\d.]+$",
    "lightning_module": r"pretrained weights: Dice [\d.]+ before, [\d.]+ after$",
}


def read_cells(notebook: str) -> list[tuple[str, str]]:
    """Type and source of each cell."""
    content = json.loads((EXAMPLES / f"{notebook}.ipynb").read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in content["cells"]]


def test_every_example_is_run_and_in_the_table():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == PRINTED.keys()
    assert set(re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\)", README, re.MULTILINE)) == PRINTED.keys()
    assert set(re.findall(r"\]\((\w+)\.ipynb\)", README)) == set(NOTEBOOKS)


# Lightning's own use of what torch has replaced; MONAI's word on a decoder of DICOM that nobody asked for.
@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", PRINTED)
def test_runs_and_prints_what_it_promises(name, tmp_path, monkeypatch, capsys):
    if name == "lightning_module":
        pytest.importorskip("lightning")
    run_example(name, tmp_path, monkeypatch)
    assert re.search(PRINTED[name], capsys.readouterr().out, re.MULTILINE)


def run_example(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Runs a script, or the code of its notebook, in a folder."""
    monkeypatch.setenv("MEDMIM_SMOKE", "1")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.chdir(folder)
    variables = {"__name__": "__main__"}
    if name in NOTEBOOKS:
        parts = [source for kind, source in read_cells(name) if kind == "code"]
    else:
        parts = [(EXAMPLES / f"{name}.py").read_text(encoding="utf-8")]
    for part in parts:
        exec(compile(part, f"{name}.py", "exec"), variables)


def test_a_folder_of_ones_own_is_what_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "scans").mkdir()
    shutil.copy(EXAMPLES / "data" / "brain_t1.nii.gz", tmp_path / "scans" / "mine.nii.gz")
    run_example("continue_pretraining", tmp_path, monkeypatch, "scans")
    assert re.search(r"^after: .*mine\.nii\.gz [\d.]+", capsys.readouterr().out, re.MULTILINE)


def test_a_folder_without_scans_is_told(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="has no NIfTI file that can be used"):
        run_example("own_folder", tmp_path, monkeypatch, str(tmp_path))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_its_script(name):
    jupytext = pytest.importorskip("jupytext")
    script = jupytext.read(EXAMPLES / f"{name}.py")
    assert read_cells(name) == [(cell.cell_type, cell.source) for cell in script.cells]
