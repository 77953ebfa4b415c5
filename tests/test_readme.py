"""What the README and the pages of docs/ show can be done as it stands."""

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import medmim
from medmim import cli
from medmim_training import cli as training_cli

ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT): page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES[Path("README.md")]


def blocks(language: str) -> list[tuple[Path, str]]:
    """The code blocks of all pages in a language, each with its page."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(page, code) for page, text in PAGES.items() for code in pattern.findall(text)]


PYTHON = [pytest.param(page, code, id=f"{page.stem}: {code.splitlines()[-1][:40]}") for page, code in blocks("python")]
SHELL = [line for _, code in blocks("bash") for line in code.splitlines()]
LINKS = [
    (page, link) for page, text in PAGES.items() for link in sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", text)))
]


@pytest.mark.skipif(not medmim.list_pretrained("vit_t_mae3d"), reason="the weights are not there yet")
@pytest.mark.parametrize(("page", "code"), PYTHON)
def test_python_runs_and_prints_what_is_beside_it(page, code, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(code, str(page), "exec"), {})
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert expected
    assert capsys.readouterr().out.splitlines() == expected


def test_the_two_commands_are_there():
    install = "python -m venv .venv && . .venv/bin/activate && pip install -e "
    assert [line for line in SHELL if "pip" in line] == [
        f"{install}. && medmim demo",
        f'{install}".[train,test]" && pytest -n auto',
    ]


def test_ci_takes_the_test_command_from_the_readme():
    (pattern,) = re.findall(r"grep -m 1 '(.*)' README\.md", (ROOT / ".ci" / "run").read_text())
    assert len(re.findall(f"^.*{pattern}", README, re.MULTILINE)) == 1


@pytest.mark.parametrize(("program", "app"), [("medmim", cli.app), ("medmim-train", training_cli.app)])
def test_commands_exist(program, app):
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    used = {shlex.split(line)[1] for line in SHELL if line.startswith(f"{program} ")}
    assert used
    assert used <= known


def test_recipes_exist():
    used = {word for line in SHELL if line.startswith("medmim-train ") for word in line.split()}
    recipes = {word for word in used if word.startswith(("small/", "finetune/"))}
    assert {recipe.partition("/")[0] for recipe in recipes} == {"small", "finetune"}
    assert all((ROOT / "training" / "recipes" / f"{recipe}.yaml").is_file() for recipe in recipes)


def test_table_of_models_is_the_catalog():
    rows = re.findall(r"^\| `(\w+)` \| (\d+), (\d+), (\d+) \| (\d+ M) \|", README, re.MULTILINE)
    described = {name: tuple(map(int, numbers)) for name, *numbers, _ in rows}
    catalog = medmim.list_models("vit_*", exclude_filters="*_p8", tags="mae")
    assert described == {
        name: tuple(medmim.model_info(name).args[key] for key in ("embed_dim", "depth", "num_heads"))
        for name in catalog
    }
    assert all(f"({size} parameters)" in medmim.model_info(name).description for name, *_, size in rows)
    assert all(medmim.is_model(f"{name}_p8") for name in catalog)


@pytest.mark.parametrize("name", medmim.list_models(exclude_filters="*_p8"))
def test_every_model_is_named(name):
    assert f"`{name}`" in README


@pytest.mark.parametrize(("page", "link"), LINKS, ids=str)
def test_linked_files_and_sections_exist(page, link):
    file, _, section = link.partition("#")
    target = (page.parent / file) if file else page
    assert (ROOT / target).is_file()
    titles = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(), re.MULTILINE) if section else []
    assert not section or section in {title.lower().replace(" ", "-") for title in titles}


def test_every_page_is_linked_from_the_readme():
    assert set(PAGES) == {Path("README.md")} | {Path(link) for _, link in LINKS if link.startswith("docs/")}


def test_the_figures_of_segmentation_are_those_of_its_runs():
    with open(ROOT / "training/results/paper-small/results.csv", newline="", encoding="utf-8") as file:
        runs = [row for row in csv.DictReader(file) if "methods:" in row["rows"]]
    dice = {}
    for run in runs:
        dice.setdefault(run["rows"].split(";")[0], []).append(float(run["test_dice"]))
    assert {len(found) for found in dice.values()} == {5}
    for row, found in dice.items():
        assert f"{np.mean(found):.3f}" in README, row


def test_the_figures_are_those_of_the_weights_record():
    """The table of the README beside the evidence in the catalog, from which the card is made."""
    rows = {
        cells[0].split("`")[1]: [cell.strip() for cell in cells[1:]]
        for cells in (line.strip("|").split("|") for line in README.splitlines())
        if len(cells) == 7 and "`" in cells[0] and "mae3d" not in cells[0]
    }
    for column, name in enumerate(("vit_t_mae3d", "vit_t_simmim3d", "vit_b_mae3d"), start=1):
        (weights,) = medmim.model_info(f"{name}.open_mix").weights
        assert rows.keys() == {evidence.dataset for evidence in weights.evidence}
        for evidence in weights.evidence:
            row = rows[evidence.dataset]
            fills = evidence.baselines["nearest visible"], evidence.baselines["mean fill"]
            assert [row[0], row[column], *row[4:]] == [
                str(evidence.cases),
                *(f"{figure:.3f}" for figure in (evidence.value, *fills)),
            ]
