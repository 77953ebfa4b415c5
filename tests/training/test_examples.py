"""Each example runs as it stands, in a tiny setting, and prints what it promises; notebooks are their scripts."""

import json
import re
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
    monkeypatch.setenv("MEDMIM_SMOKE", "1")
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    variables = {"__name__": "__main__"}
    if name in NOTEBOOKS:
        parts = [source for kind, source in read_cells(name) if kind == "code"]
    else:
        parts = [(EXAMPLES / f"{name}.py").read_text(encoding="utf-8")]
    for part in parts:
        exec(compile(part, f"{name}.py", "exec"), variables)
    assert re.search(PRINTED[name], capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_its_script(name):
    jupytext = pytest.importorskip("jupytext")
    script = jupytext.read(EXAMPLES / f"{name}.py")
    assert read_cells(name) == [(cell.cell_type, cell.source) for cell in script.cells]
