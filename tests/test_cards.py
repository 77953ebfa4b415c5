"""Cards: made from the record alone, read as the Hub reads them, and what they show can be done as it stands."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

import medmim
from fakes import RECORD, TINY, save_tiny, tiny_model
from medmim import cli, hub
from medmim.cards import render_card
from medmim.cards.catalog import check_cards, write_cards
from medmim.cards.encoder import PICTURE_FILE, card_scan
from medmim.cards.sections import METHODS
from medmim.errors import SpecError
from medmim_training.methods import METHODS as TRAINED
from synthetic import write_scan

CARDS = Path(__file__).parents[1] / "model_cards"
TRAINING = {
    "method": "mae",
    "recipe": "small/vit_t_mae3d",
    "steps": 10,
    "crops": 40,
    "volumes": 3,
    "wall_hours": 30.0,
    "cpu_hours": 30.0,
    "hardware": "1 CPU core",
    "final_loss": 0.5,
    "date": "2026-11-01",
    "data": [
        {"name": "org/set", "volumes": 2, "modality": "MR", "license": "CC-BY-4.0"},
        {"name": "ours", "volumes": 1, "modality": "CT", "license": "CC-BY-4.0"},
    ],
}
EVIDENCE = {"dataset": "other", "protocol": "75% hidden", "metric": "normalised MSE", "value": 0.25, "cases": 2}


def spec_with(tmp_path, *, args=None, **changes):
    record = {**RECORD, "training": TRAINING, "evidence": [{**EVIDENCE, "baselines": {"mean fill": 1.0}}], **changes}
    model = tiny_model(**(args or {}))
    return medmim.save_pretrained(model, tmp_path / "model", weights={**record, "decoder_spec": None})


@pytest.fixture
def spec(tmp_path):
    return spec_with(tmp_path)


@pytest.fixture
def catalog(spec, registry, monkeypatch, tmp_path):
    """One more set of weights in the catalog, and a folder with the cards of all: (name, folder)."""
    monkeypatch.setattr(hub, "PACKAGED", tmp_path / "weights")
    registry.register_model("tiny", family="vit", args=spec.args, weights=[spec.weights])
    (tmp_path / "cards").mkdir()
    write_cards(tmp_path / "cards")
    return "tiny.fake", tmp_path / "cards"


# --- the checked-in ones ----------------------------------------------------------------------------------------------


def test_the_checked_in_cards_are_fresh():
    assert check_cards(CARDS) == []


@pytest.mark.parametrize("name", medmim.list_pretrained())
def test_the_code_of_a_card_runs(name, tmp_path, monkeypatch):
    if not (hub.PACKAGED / name).is_dir():
        pytest.skip(f"{name} does not ship with the source")
    blocks = re.findall(r"^```python\n(.*?)^```$", (CARDS / f"{name}.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    scan = card_scan(medmim.model_info(name).weights[0].volume)
    shutil.copy(scan.path, tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        scope = {}
        exec(compile(block, f"{name}.md", "exec"), scope)
        assert scope["features"].shape == (1, scope["model"].num_features)


@pytest.mark.parametrize("path", sorted(CARDS.glob("*.md")), ids=lambda path: path.stem)
def test_pictures_of_cards_exist(path):
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", path.read_text("utf-8")):
        assert (CARDS / picture).is_file()


# --- what a card says -------------------------------------------------------------------------------------------------


def test_front_matter(spec):
    data = ModelCard(render_card(spec)).data
    assert data.library_name == "medmim"
    assert data.license == "cc-by-4.0"
    assert data.pipeline_tag == "image-feature-extraction"
    assert {"medical", "3d", "masked-image-modeling", "mae", "ct", "mr", "vit"} <= set(data.tags)
    assert data.datasets == ["org/set"]
    assert data.base_model is None
    (result,) = data.eval_results
    assert (data.model_name, result.metric_value, result.dataset_name) == (spec.name, 0.25, "other")


def test_front_matter_of_a_fine_tuned_classifier(tmp_path):
    spec = spec_with(tmp_path, args={"num_classes": 4}, base_model="org/base", evidence=[])
    card = ModelCard(render_card(spec))
    assert card.data.pipeline_tag == "image-classification"
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "finetune")
    assert card.data.eval_results is None
    assert "## Results" not in card.text


def test_a_tuned_model_names_what_it_was_tuned_from(tmp_path):
    save_tiny(tmp_path / "base")
    model = medmim.from_pretrained(tmp_path / "base")
    published = model.spec.weights.model_copy(update={"repo": "org/base"})
    model.spec = model.spec.model_copy(update={"weights": published})
    saved = medmim.save_pretrained(model, tmp_path / "tuned")
    assert saved.weights.base_model == "org/base"
    again = medmim.save_pretrained(medmim.from_pretrained(tmp_path / "tuned"), tmp_path / "again")
    assert again.weights.base_model == "org/base"


def test_runs_that_the_weights_went_through_and_their_data(tmp_path):
    fewer = {**TRAINING, "recipe": "middle", "data": TRAINING["data"][:1], "before": {**TRAINING, "recipe": "first"}}
    text = render_card(spec_with(tmp_path, training={**TRAINING, "before": {**fewer, "widened": True}}))
    runs = re.findall(r"^\| (\d) \| `([\w/]+)` \|", text, re.MULTILINE)
    assert runs == [("1", "first"), ("2", "middle"), ("3", TRAINING["recipe"])]
    assert "the one above it. The network of run 2 is wider: channels of the one above it were copied." in text
    assert "| collection | modality | volumes in run 1, 3 | volumes in run 2 | licence |" in text
    assert text.count("| org/set |") == text.count("| ours |") == 1
    assert "| org/set | MR | 2 | 2 | CC-BY-4.0 |" in text
    assert "| ours | CT | 1 | 0 | CC-BY-4.0 |" in text


def test_data_of_several_runs_is_listed_once_where_it_is_the_same(tmp_path):
    text = render_card(spec_with(tmp_path, training={**TRAINING, "before": TRAINING}))
    assert "| collection | modality | volumes | licence |" in text
    assert text.count("| org/set |") == 1


def test_demonstration_scale_is_of_all_runs_together(tmp_path):
    short = {**TRAINING, "wall_hours": 20}
    assert "demonstration scale" in render_card(spec_with(tmp_path / "short", training=short))
    long = {**short, "before": short}
    assert "demonstration scale" not in render_card(spec_with(tmp_path / "long", training=long))


# --- models for a task ------------------------------------------------------------------------------------------------

CLASSES = ("background", "left | right")


@pytest.fixture
def pretrained(spec, tmp_path):
    """A name of weights with a training record, which were published."""
    published = spec.weights.model_copy(update={"repo": "org/base"})
    hub.write_config(tmp_path / "model", spec.model_copy(update={"weights": published}))
    return f"local-dir:{tmp_path / 'model'}"


def tuned(kind, name):
    if kind == "segmentation":
        return medmim.create_segmenter(name, "light", classes=CLASSES, decoder_args={"width": 2}, pretrained=True)
    model = medmim.create_model(name, pretrained=True, num_classes=2)
    medmim.name_classes(model, CLASSES)
    return model


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_the_card_of_a_fine_tuned_model(kind, pretrained, tmp_path):
    saved = medmim.save_pretrained(tuned(kind, pretrained), tmp_path / "tuned")
    assert saved.name == f"vit_t_mae3d.fake_{kind}"
    assert (saved.task.origin.name, saved.task.origin.license) == ("vit_t_mae3d.fake", "CC-BY-4.0")
    text = render_card(saved)
    data = ModelCard(text).data
    assert data.pipeline_tag == f"image-{kind}"
    assert (data.base_model, data.base_model_relation, data.datasets) == ("org/base", "finetune", None)
    assert {kind, "vit", "ct", "mr"} <= set(data.tags)
    assert not {"mae", "masked-image-modeling", "self-supervised-learning"} & set(data.tags)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        *("Use", "Classes", "Input", "Started from", "Limits", "Out of scope", "Files and licence", "Citation"),
    ]
    for part in (
        "# vit_t_mae3d.fake_",
        "| 0 | background |\n| 1 | left \\| right |",
        "started from the weights `vit_t_mae3d.fake`, licence CC-BY-4.0; they were pretrained by masked image mod",
        saved.weights.encoder[0].sha256,
    ):
        assert part in text
    for part in ("Images only", "hidden", "reconstruct", "meant to be fine-tuned", "create_transform", "10 steps"):
        assert part not in text

    # Once more, with another name of a class: what it started from stays, and so does the tag.
    again = medmim.from_pretrained(tmp_path / "tuned")
    medmim.name_classes(again, ("background", "other"))
    again = medmim.save_pretrained(again, tmp_path / "again")
    assert (again.name, again.task.origin) == (saved.name, saved.task.origin)


def test_a_record_of_its_own_keeps_what_a_tuned_model_started_from(pretrained, tmp_path):
    record = {**RECORD, "tag": "ours", "license": "MIT", "evidence": [EVIDENCE], "decoder_spec": None}
    saved = medmim.save_pretrained(tuned("segmentation", pretrained), tmp_path / "tuned", weights=record)
    assert (saved.name, saved.weights.base_model) == ("vit_t_mae3d.ours", "org/base")
    text = render_card(saved)
    assert "started from the weights `vit_t_mae3d.fake`, licence CC-BY-4.0. The model" in text
    assert "Weights: MIT. Those that they started from: CC-BY-4.0. Code" in text
    assert ModelCard(text).data.eval_results[0].task_type == "image-segmentation"
    assert "beyond the results above" in text
    again = medmim.save_pretrained(medmim.from_pretrained(tmp_path / "tuned"), tmp_path / "again")
    assert again.name == saved.name


def test_a_tuned_model_that_started_from_random_weights(tmp_path):
    model = medmim.create_segmenter("vit_t_mae3d", "linear", classes=CLASSES, **TINY["vit"])
    saved = medmim.save_pretrained(model, tmp_path, weights={**RECORD, "decoder_spec": None})
    assert saved.task.origin is None
    text = render_card(saved)
    assert "tarted from" not in text
    assert "fine-tuned from" not in text


def test_a_tuned_model_that_was_saved_without_its_origin(pretrained, registry, tmp_path):
    saved = medmim.save_pretrained(tuned("segmentation", pretrained), tmp_path / "tuned")
    weights = saved.weights.model_copy(update={"tag": "fake"})
    old = saved.model_copy(update={"weights": weights, "task": saved.task.model_copy(update={"origin": None})})
    assert "started from the weights `vit_t_mae3d.fake`" in render_card(old)
    hub.write_config(tmp_path / "tuned", old.model_copy(update={"architecture": "tiny"}))
    registry.register_model("tiny", family="vit", args=saved.args, weights=[weights])
    again = medmim.save_pretrained(medmim.from_pretrained(tmp_path / "tuned"), tmp_path / "again")
    assert again.name == "tiny.fake_segmentation"


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_a_tuned_model_is_pushed_with_a_card_whose_code_runs(kind, pretrained, call, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMIM_HUB", str(tmp_path / "hub"))
    medmim.save_pretrained(tuned(kind, pretrained), tmp_path / "tuned")
    code, out, err = call("push", tmp_path / "tuned", "org/tuned")
    assert (code, err) == (0, "")
    assert f"vit_t_mae3d.fake_{kind} to org/tuned" in out
    assert "catalog" not in out
    (card,) = (tmp_path / "hub/org/tuned/snapshots").glob("*/README.md")
    text = card.read_text("utf-8")
    assert "# org/tuned\n" in text
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"^```bash\nmedmim (.*?)\n```$", text, re.MULTILINE)
    (tmp_path / "scans").mkdir()
    write_scan(tmp_path / "scan.nii.gz", ct=True)
    write_scan(tmp_path / "scans" / "scan.nii.gz", ct=True)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "card", "exec"), {})
    assert call(*command.split())[0] == 0
    if kind == "segmentation":
        masks = [medmim.load_volume(tmp_path / name).array for name in ("mask.nii.gz", "masks/scan.nii.gz")]
        np.testing.assert_array_equal(*masks)


def test_sections(spec):
    text = render_card(spec)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "Use",
        "Input",
        "Pretraining",
        "Data",
        "Results",
        "Limits",
        "Out of scope",
        "Files and licence",
        "Citation",
    ]
    for part in ("Not a medical device", "| ours | CT | 1 | CC-BY-4.0 |", spec.weights.encoder[0].sha256, "@misc{fake"):
        assert part in text
    assert "demonstration scale" not in text


def test_what_was_not_masked_is_not_called_so(tmp_path):
    text = render_card(spec_with(tmp_path, training={**TRAINING, "method": "simclr", "wall_hours": 1.0}))
    assert "contrastive learning (SimCLR)" in text
    assert "mask" not in text
    assert "demonstration scale" in text


def test_every_method_has_a_name():
    assert METHODS.keys() == TRAINED.keys()


def test_a_picture_is_shown_with_its_source(spec):
    text = render_card(spec, picture=f"../weights/{PICTURE_FILE}")
    assert f"](../weights/{PICTURE_FILE})" in text
    assert "LIDC-IDRI-0001, The Cancer Imaging Archive, CC-BY-3.0" in text
    assert "![" not in render_card(spec)


def test_the_scan_of_a_card_is_of_a_modality_that_the_weights_know(spec):
    assert card_scan(spec.weights.volume).modality == "CT"
    only = {"PET": {"kind": "percentile"}}
    assert card_scan(medmim.VolumeSpec.parse({"intensity": only}, source="test")) is None


def test_weights_without_a_training_record_have_no_card(tmp_path):
    save_tiny(tmp_path)
    with pytest.raises(SpecError, match="needs weights with a training record"):
        render_card(medmim.from_pretrained(tmp_path).spec)


# --- the command ------------------------------------------------------------------------------------------------------


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["medmim", "cards", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_stale_missing_and_foreign_cards_are_found_and_written_anew(catalog, monkeypatch, capfd):
    name, folder = catalog
    assert run(monkeypatch, folder, "--check") == 0
    fresh = (folder / f"{name}.md").read_text("utf-8")
    others = [path for path in folder.glob("*.md") if path.stem != name]
    (folder / f"{name}.md").write_text(fresh.replace("| 10 | 40 |", "| 11 | 40 |"))
    for path in others:
        path.unlink()
    capfd.readouterr()
    assert run(monkeypatch, folder, "--check") == 1
    assert capfd.readouterr().err.splitlines() == [
        f"medmim: error: {path}: {problem}"
        for path, problem in sorted(
            [
                (folder / f"{name}.md", "stale; `medmim cards` writes it anew"),
                *((path, "missing; `medmim cards` writes it") for path in others),
            ]
        )
    ]
    assert run(monkeypatch, folder) == 0
    assert (folder / f"{name}.md").read_text("utf-8") == fresh
    assert run(monkeypatch, folder, "--check") == 0

    (folder / "gone.md").write_text("somebody's")
    assert run(monkeypatch, folder) == 1
    assert "gone.md: no weights of the catalog are called so; delete it" in capfd.readouterr().err
    assert (folder / "gone.md").is_file()


def test_a_picture_beside_the_weights_gets_into_the_card(catalog):
    name, folder = catalog
    (hub.PACKAGED / name).mkdir(parents=True)
    (hub.PACKAGED / name / PICTURE_FILE).write_bytes(b"png")
    assert [path.stem for path in write_cards(folder)] == [name]
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", (folder / f"{name}.md").read_text("utf-8"))
    assert (folder / picture).resolve() == (hub.PACKAGED / name / PICTURE_FILE).resolve()


def test_no_folder_is_one_line(tmp_path, monkeypatch, capfd):
    assert run(monkeypatch, tmp_path / "missing", "--check") == 1
    assert capfd.readouterr().err.endswith("there is no such folder; cards are in model_cards of a checkout\n")
