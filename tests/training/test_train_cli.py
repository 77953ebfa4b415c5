"""The command line `medmim-train`: what it refuses, in which words, and what it has printed by then."""

import json
import shutil
import sys
from functools import partial

import pytest

from medmim.cli.terminal import console
from medmim.errors import SpecError
from medmim_training import cli
from medmim_training.recipe import list_recipes, recipe_folder
from medmim_training.store.index import INDEX_FILE, Store
from medmim_training.tasks.recipe import FineTuneRecipe


@pytest.fixture
def train(run_command):
    """Runs `medmim-train` with arguments, see `run_command`."""
    return partial(run_command, "medmim-train", lambda: cli.main())


# --- installation -----------------------------------------------------------------------------------------------------


def test_an_installation_without_the_extra_says_what_to_install(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "blosc2", None)
    monkeypatch.delitem(sys.modules, "medmim_training.store.index")
    code, out, err = train("prepare", tmp_path, "-o", tmp_path / "store", "--recipe", "small/vit_t_mae3d")
    assert (code, out) == (1, "")
    assert err == "medmim-train: error: blosc2 is missing; pip install 'medmim[train]'\n"


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["7", "0", "nan"])
def test_an_impossible_ratio_is_wrong_usage(train, ratio):
    code, out, err = train("evaluate", "nowhere", "scans", "--ratio", ratio)
    assert (code, out) == (2, "")
    assert "--ratio" in err


@pytest.mark.parametrize("tflops", ["0", "nan", "inf"])
def test_an_impossible_rate_is_wrong_usage(train, tflops):
    code, out, err = train("pretrain", "small/vit_t_mae3d", "--plan", "--tflops", tflops)
    assert (code, out) == (2, "")
    assert "--tflops" in err


def test_more_threads_than_torch_can_take_are_wrong_usage(train):
    code, out, err = train("pretrain", "small/vit_t_mae3d", "--plan", "--threads", "99999999999999")
    assert (code, out) == (2, "")
    assert "--threads" in err


# --- folders ----------------------------------------------------------------------------------------------------------

DESCRIBED = ("--tag", "ours", "--license", "CC-BY-4.0")


@pytest.mark.parametrize(
    "arguments",
    [
        ("prepare", "SCANS", "--recipe", "small/vit_t_mae3d"),
        ("pretrain", "small/vit_t_mae3d", "--data", "STORE"),
        ("finetune", "finetune/vit_t_unetr", "data=nowhere"),
        ("probe", "vit_t_mae3d", "data=nowhere.csv"),
        ("test", "RUN"),
        ("inspect", "STORE"),
        ("fetch-data", "hippocampus"),
        ("package", "RUN", "--data", "STORE", "--citation", "RUN/recipe.yaml", *DESCRIBED),
        ("reproduce", "paper-small", "--data", "SCANS"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_file_where_a_folder_is_to_be_written(train, scans, store, finished, tmp_path, arguments):
    output = tmp_path / "file"
    output.write_text("kept")
    places = {"SCANS": scans, "STORE": store.folder, "RUN": finished[1], "RUN/recipe.yaml": finished[1] / "recipe.yaml"}
    code, out, err = train(*(places.get(each, each) for each in arguments), "-o", output)
    assert (code, out) == (1, "")
    assert err.startswith(f"medmim-train: error: {output}")
    assert err.endswith(": cannot be written (Not a directory); choose another output\n")
    assert output.read_text() == "kept"


def test_a_run_that_does_not_exist(train, store, finished, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert train("test", nowhere)[1:] == (
        "",
        f"medmim-train: error: {nowhere}: no such folder; give that of a run of `medmim-train finetune`\n",
    )
    described = ("--data", store.folder, "--citation", finished[1] / "recipe.yaml", *DESCRIBED)
    for command, place in (("package", ("-o", tmp_path / "out")), ("publish", ("org/name", "--dry-run"))):
        code, out, err = train(command, nowhere, *place, *described)
        assert (code, out) == (1, "")
        assert err.endswith(": no such folder; give that of a run of `medmim-train pretrain`\n")


def test_a_data_set_that_does_not_exist(train, tmp_path):
    code, out, err = train("fetch-data", "liver", "-o", tmp_path / "liver")
    assert (code, out) == (1, "")
    assert err == "medmim-train: error: there is no data set 'liver' to fetch; there is hippocampus\n"


def test_probe_draws_nothing_before_its_input_is_checked(train, tmp_path):
    code, out, err = train("probe", "vit_t_mae3d", f"data={tmp_path / 'cases.csv'}", "-o", tmp_path / "probe")
    assert (code, out) == (1, "")
    assert "no such file" in err


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_for_pretraining_is_not_fine_tuned(train, tmp_path):
    code, _, err = train("finetune", "small/vit_t_mae3d", "-o", tmp_path / "run")
    assert code == 1
    assert "is a recipe for pretraining, for `medmim-train pretrain`; what this needs are finetune/" in err
    assert all(name in err for name in list_recipes(FineTuneRecipe))


@pytest.mark.parametrize("name", list_recipes(FineTuneRecipe))
def test_a_recipe_for_fine_tuning_is_not_pretrained(train, name):
    code, _, err = train("pretrain", name, "--plan")
    assert code == 1
    assert "is a recipe for fine-tuning, for `medmim-train finetune`; what this needs are " in err
    assert "small/vit_t_mae3d" in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method.args.decoder.dept=2",
            "method.args.decoder.dept is no argument of the decoder mae; did you mean 'depth'?",
        ),
        (
            "method.args.hiding.rul=block",
            "method.args.hiding.rul is no argument of a hiding rule; did you mean 'rule'?",
        ),
        ("method.args.rati=0.5", "method.args.rati is no argument of mae; did you mean 'ratio'?"),
        ("method.args.ratio=0.001", "method.args of mae: ratio 0.001 hides 0 of 216 tokens"),
        ("method.args.hiding={rule: block, block: [0, 1, 1]}", "method.args of mae: block [0, 1, 1] must be"),
        ("model.args.dept=2", "vit_t_mae3d: there is no argument 'dept'; nearest: depth"),
    ],
)
def test_an_argument_that_does_not_exist_is_named_by_its_key(train, override, message):
    code, _, err = train("pretrain", "small/vit_t_mae3d", override, "--plan", "--tflops", "1")
    assert code == 1
    assert err.startswith(f"medmim-train: error: {message}")


def test_a_name_is_no_markup(train, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    packaged = (recipe_folder() / "finetune" / "vit_t_light.yaml").read_text()
    recipe.write_text(packaged.replace("name: finetune/vit_t_light", "name: a [/b]"))
    code, out, err = train("finetune", recipe, f"data={tmp_path / 'nowhere'}", "-o", tmp_path / "run")
    assert code == 1
    assert "a [/b]" in out
    assert err.startswith(f"medmim-train: error: {tmp_path / 'nowhere'}")


# --- stores -----------------------------------------------------------------------------------------------------------


def test_an_index_whose_occupancy_is_not_of_the_volume(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "other")
    index = tmp_path / "other" / INDEX_FILE
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    for wrong in ("AAAA" * 50, "A", ""):
        index.write_text("".join(json.dumps(line | {"occupancy": wrong}) + "\n" for line in lines))
        with pytest.raises(SpecError, match=rf"{INDEX_FILE}:1"):
            Store(tmp_path / "other")


def test_a_path_is_printed_in_one_piece(train, store, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "width", 60)
    folder = tmp_path / ("long" * 20)
    code, out, _ = train("inspect", store.folder, "-o", folder)
    assert code == 0
    assert f"\n{folder / 'histograms.png'}\n" in out
