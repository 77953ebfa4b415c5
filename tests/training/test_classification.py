"""Classification on volumes made by formula: data, scores, fine-tuning, probes of frozen features."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from test_engine import Interrupted, stop_at
from test_finetune import RUN, lines
from test_finetune import data as segmentation_data  # noqa: F401
from test_finetune import make_recipe as make_segmentation_recipe

import medmim
from medmim.classification import classify
from medmim.errors import ScanError, SpecError
from medmim_training import cli
from medmim_training.engine import NonFiniteLossError
from medmim_training.preemption import Preempted
from medmim_training.recipe import load_recipe
from medmim_training.tasks import classification
from medmim_training.tasks import probe as probing
from medmim_training.tasks.cases import split_cases
from medmim_training.tasks.classification import ClassificationTask
from medmim_training.tasks.crops import ChangedVolumes
from medmim_training.tasks.evaluation import evaluate_run
from medmim_training.tasks.finetuning import finetune
from medmim_training.tasks.labelled import find_labelled
from medmim_training.tasks.loop import Run, claim_split
from medmim_training.tasks.metrics import score_classes
from medmim_training.tasks.recipe import ChangeSection, ClassificationRecipe, FineTuneRecipe, ProbeRecipe
from scans import write_dicom

CLASSES = ("thick", "thin")
VOLUME = {"spacing": (2, 2, 2), "intensity": {"MR": {"kind": "percentile"}}}
MODEL = {
    "name": "vit_t_mae3d",
    "pretrained": False,
    "args": {
        "img_size": (16, 24, 16),
        "patch_size": (4, 8, 8),
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "drop_path_rate": 0.2,
        "global_pool": "attn",
    },
}


def rod(seed: int, *, thick: bool, shape=(16, 20, 16)) -> np.ndarray:
    """A rod through dim texture, thin or thick."""
    generator = np.random.default_rng(seed)
    y, z = (generator.integers(6, side - 6) for side in shape[1:])
    half = 4 if thick else 1
    volume = generator.uniform(0, 60, shape)
    volume[:, y - half : y + half, z - half : z + half] = 255
    return volume.astype(np.uint8)


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """Volumes in MedMNIST's layout, the first class rarer."""
    arrays, seed = {}, 0
    for side, count in (("train", 16), ("val", 8), ("test", 6)):
        labels = np.array([[int(i % 4 != 0)] for i in range(count)], np.uint8)
        arrays[f"{side}_images"] = np.stack([rod(seed + i, thick=label == 0) for i, (label,) in enumerate(labels)])
        arrays[f"{side}_labels"], seed = labels, seed + count
    path = tmp_path_factory.mktemp("rods") / "rods.npz"
    np.savez_compressed(path, **arrays)
    return path


def make_recipe(data, **changes) -> ClassificationRecipe:
    recipe = {
        **RUN,
        "task": "classification",
        "data": str(data),
        "classes": CLASSES,
        "model": MODEL,
        "volume": VOLUME,
        "modality": "MR",
        "batch_size": 4,
        "schedule": {"steps": 9, "warmup": 2},
        "output": {"log_every": 1, "checkpoint_every": 3},
    }
    return ClassificationRecipe.model_validate(recipe | changes)


@pytest.fixture(scope="session")
def recipe(archive):
    return make_recipe(archive)


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory):
    """The best model and the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("classified")
    return finetune(recipe, folder), folder


# --- data -------------------------------------------------------------------------------------------------------------


def write_list(path, rows: list[str], header="image,label") -> None:
    path.write_text("\n".join([header, *rows]) + "\n")


def test_an_archive_keeps_its_own_split(archive):
    cases, classes = find_labelled(archive)
    split = split_cases(cases, 0, source="x")
    assert [len(side) for side in (split.training, split.validation, split.test)] == [16, 8, 6]
    assert {case.name[:3] for case in split.validation} == {"val"}
    assert classes == ("class 0", "class 1")
    stored = np.load(archive)
    np.testing.assert_array_equal(split.test[2].image, stored["test_images"][2])
    assert [case.label for case in split.test] == stored["test_labels"].ravel().tolist()
    with pytest.raises(SpecError, match=r"fold 1 leaves nobody .*\[0\]"):
        split_cases(cases, 1, source="x")


def test_a_list_names_or_numbers_classes(tmp_path):
    path = tmp_path / "list.csv"
    write_list(path, ["a.nii.gz,thin", "b.nii.gz,thick", "c.nii.gz,thin"])
    cases, classes = find_labelled(path)
    assert (classes, [case.label for case in cases]) == (CLASSES, [1, 0, 1])
    assert (cases[1].name, cases[1].image) == ("b", tmp_path / "b.nii.gz")
    assert find_labelled(path, classes=("thin", "thick", "none"))[0][0].label == 0
    write_list(path, ["a.nii.gz,1", "b.nii.gz,0"])
    cases, classes = find_labelled(path)
    assert (classes, [case.label for case in cases]) == (("class 0", "class 1"), [1, 0])
    assert find_labelled(path, classes=CLASSES)[1] == CLASSES


def test_a_list_says_who_validates(tmp_path):
    path = tmp_path / "list.csv"
    sides = ("train", "val", "test", "train")
    rows = [f"{i}.nii.gz,{i % 2},{side},s{i}" for i, side in enumerate(sides)]
    write_list(path, rows, "image,label,split,subject_group")
    split = split_cases(find_labelled(path)[0], 0, source="x")
    assert [[case.name for case in side] for side in (split.training, split.validation, split.test)] == [
        ["0", "3"], ["1"], ["2"],
    ]  # fmt: skip
    rows[3] = "3.nii.gz,1,train,s1"
    write_list(path, rows, "image,label,split,subject_group")
    with pytest.raises(SpecError, match="subject s1 is in more than one"):
        split_cases(find_labelled(path)[0], 0, source="x")


def test_what_is_wrong_with_the_data_is_said(tmp_path, archive):
    path = tmp_path / "list.csv"
    write_list(path, ["a.nii.gz,other"])
    for options, message in (({"classes": CLASSES}, "label of a is none of the 2"), ({}, "fewer than two classes")):
        with pytest.raises(SpecError, match=message):
            find_labelled(path, **options)
    with pytest.raises(SpecError, match=r"list\.csv: two of classes= are called 'thin'"):
        find_labelled(path, classes=("thin", "thin", "other"))
    write_list(path, ["a/scan.nii.gz,0", "b/scan.nii.gz,1"])
    with pytest.raises(SpecError, match="two cases are called scan"):
        find_labelled(path)
    write_list(path, ["a.nii.gz,0", "b.nii.gz,1000000000"])
    with pytest.raises(SpecError, match="label of b is none of the 2"):
        find_labelled(path)
    write_list(path, ["a.nii.gz,1", "b.nii.gz,2", "c.nii.gz,2"])
    with pytest.raises(SpecError, match=r"list\.csv: its labels go up to 2, but none is 0; number the classes 0, 1"):
        find_labelled(path)
    write_list(path, [], "image")
    with pytest.raises(SpecError, match="needs the column label"):
        find_labelled(path)
    with pytest.raises(SpecError, match="no such file"):
        find_labelled(tmp_path / "nowhere.csv")
    with pytest.raises(SpecError, match="has its own split"):
        find_labelled(archive, path)
    stored = dict(np.load(archive))
    for changes, message in (
        ({"val_images": stored["val_images"][..., :3]}, "val_images are .*, not volumes"),
        ({"test_labels": stored["test_labels"][:2]}, "test_labels are no number for each of the 6"),
        ({"train_labels": stored["train_labels"].astype(object)}, "rods.npz: cannot be read"),
    ):
        np.savez(tmp_path / "rods.npz", **(stored | changes))
        with pytest.raises(SpecError, match=message):
            find_labelled(tmp_path / "rods.npz")
    np.savez(tmp_path / "rods.npz", images=stored["val_images"])
    with pytest.raises(SpecError, match="not a file of MedMNIST's volumes"):
        find_labelled(tmp_path / "rods.npz")
    (tmp_path / "rods.npz").write_bytes(archive.read_bytes()[:200])
    with pytest.raises(SpecError, match="cannot be read"):
        find_labelled(tmp_path / "rods.npz")


def test_a_sample_is_decided_by_its_number():
    volumes = [torch.rand(1, 8, 9, 10) for _ in range(3)]
    first, again = (
        ChangedVolumes(volumes, [0, 1, 1], length=5, seed=1, settings=ChangeSection(mirror_axes=(1,))) for _ in range(2)
    )
    backwards = [again[i] for i in reversed(range(5))][::-1]
    for i in range(5):
        sample = first[i]
        assert sample["x"].shape == (1, 8, 9, 10)
        assert sample["class"] == (0, 1, 1)[sample["case"]]
        assert all(torch.equal(sample[key], backwards[i][key]) for key in sample)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_are_those_of_scikit_learn(classes):
    generator = np.random.default_rng(0)
    truth = generator.integers(classes, size=60)
    scores = generator.normal(size=(60, classes)) + 1.0 * np.eye(classes)[truth]
    probabilities = np.exp(scores.round(1)) / np.exp(scores.round(1)).sum(axis=1, keepdims=True)  # with ties
    found = score_classes(truth, probabilities)
    given = probabilities[:, 1] if classes == 2 else probabilities
    assert found.auc == pytest.approx(roc_auc_score(truth, given, multi_class="ovr", average="macro"))
    predicted = probabilities.argmax(axis=1)
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert found.accuracy == pytest.approx(accuracy_score(truth, predicted))
    for metric in ("auc", "balanced_accuracy", "accuracy"):
        low, high = getattr(found, f"{metric}_interval")
        assert low < getattr(found, metric) < high
    assert score_classes(truth, probabilities) == found


def test_a_class_that_nobody_has_does_not_count():
    truth, probabilities = (
        np.array([0, 0, 2, 2]),
        np.array([[0.6, 0.1, 0.3], [0.5, 0.2, 0.3], [0.2, 0.2, 0.6]])[[0, 1, 2, 2]],
    )
    found = score_classes(truth, probabilities)
    assert (found.auc, found.balanced_accuracy, found.accuracy) == (1, 1, 1)


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def test_it_learns(archive, tmp_path):
    plain = {"rotate": 0, "scale": 0, "appearance": 0}
    model = {**MODEL, "args": MODEL["args"] | {"drop_path_rate": 0.0}}
    changes = {"model": model, "crops": plain, "head_warmup": 0, "schedule": {"steps": 40}, "batch_size": 8}
    finetune(make_recipe(archive, output={"log_every": 1, "checkpoint_every": 40}, **changes), tmp_path)
    curve = [line["loss"] for line in lines(tmp_path / "metrics.jsonl")]
    assert sum(curve[-5:]) < 0.5 * sum(curve[:5])
    assert lines(tmp_path / "validation.jsonl")[-1]["auc"] > 0.9


def test_what_a_run_leaves(finished, archive, tmp_path):
    model, folder = finished
    validations = lines(folder / "validation.jsonl")
    best = max(validations, key=lambda each: each["auc"])
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == json.loads((folder / "split.json").read_text(encoding="utf-8"))[
        "validation"
    ]
    truth = np.array([CLASSES.index(row["label"]) for row in rows])
    probabilities = np.array([[float(row[name]) for name in CLASSES] for row in rows])
    assert roc_auc_score(truth, probabilities[:, 1]) == pytest.approx(best["auc"], abs=1e-5)

    loaded = medmim.from_pretrained(folder / "model")
    assert (loaded.spec.task.kind, loaded.spec.task.classes, loaded.global_pool) == ("classification", CLASSES, "attn")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    # What the run wrote is what the saved model says of the scan as a file.
    image = np.load(archive)["val_images"][0]
    nib.Nifti1Image(image, np.diag([2.0, 2.0, 2.0, 1.0])).to_filename(tmp_path / "scan.nii.gz")
    assert list(classify(loaded, tmp_path / "scan.nii.gz").values()) == pytest.approx(probabilities[0], abs=1e-5)


def test_classes_that_are_called_as_other_columns_hide_nothing(archive, tmp_path):
    finetune(make_recipe(archive, classes=("case", "label"), schedule={"steps": 1}), tmp_path)
    with open(tmp_path / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [f"val_{i:05d}" for i in range(8)]
    assert {row["label"] for row in rows} == {"case", "label"}
    assert all(float(row["class case"]) + float(row["class label"]) == pytest.approx(1, abs=1e-5) for row in rows)


def test_a_killed_run_resumes_bit_for_bit(finished, recipe, tmp_path):
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path, watch=stop_at(5))
    resumed = finetune(recipe, tmp_path).state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in finished[0].state_dict().items())
    for name in ("validation.jsonl", "scores.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (finished[1] / name).read_text(encoding="utf-8")


def test_sigterm_saves_and_the_run_goes_on(finished, recipe, tmp_path):
    def terminate(report):
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="saved at step 4"):
        finetune(recipe, tmp_path, watch=terminate)
    finetune(recipe, tmp_path)
    last = [
        torch.load(f / "checkpoints/step-00000009.pt", weights_only=True)["method"] for f in (tmp_path, finished[1])
    ]
    assert all(torch.equal(last[0][name], tensor) for name, tensor in last[1].items())


def test_a_frozen_encoder_learns_pool_and_classifier_alone(archive, tmp_path):
    recipe = make_recipe(archive, frozen=True, schedule={"steps": 2})
    before = classification.build_classifier(recipe, CLASSES).state_dict()
    after = finetune(recipe, tmp_path).state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {"head.weight", "attn_pool.latent"} <= changed
    assert all(name.startswith(("head.", "attn_pool.")) for name in changed)


def test_rates_and_the_weight_of_a_rare_class(recipe, tmp_path):
    task = ClassificationTask(recipe)
    assert task.weights.tolist() == pytest.approx([16 / (2 * 4), 16 / (2 * 12)])
    run = Run(task, tmp_path)
    run.schedule.step_update(2)
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    model = run.model
    head, pool, block, stem = (
        rates[id(p)]
        for p in (
            model.head.weight,
            model.attn_pool.latent,
            model.blocks[0].mlp.fc1.weight,
            model.patch_embed.proj.weight,
        )
    )
    assert head == pool > block > stem


def test_a_rare_class_counts_as_much_as_a_common_one_whatever_batch_a_case_is_in(recipe):
    task = ClassificationTask(recipe)
    truth = torch.tensor([case.label for case in task.split.training])
    outputs = torch.randn(len(truth), 2, generator=torch.Generator().manual_seed(0))
    for size in (1, 2, 8):
        parts = [task.loss(x, {"class": y}) for x, y in zip(outputs.split(size), truth.split(size), strict=True)]
        each = F.cross_entropy(outputs, truth, reduction="none")
        expected = (each[truth == 0].mean() + each[truth == 1].mean()) / 2
        assert torch.stack(parts).mean().item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_cannot_be_run_is_said(recipe, archive, finished, tmp_path, monkeypatch, segmentation_data):  # noqa: F811
    for override, message in (("task=regression", "task: Input should be"), ("overlap=0.5", "overlap is no key")):
        with pytest.raises(SpecError, match=message):
            load_recipe("finetune/vit_t_classify", ["data=x", override], kind=FineTuneRecipe)
    with pytest.raises(SpecError, match="another recipe ran here"):
        finetune(make_segmentation_recipe(segmentation_data), finished[1])
    with pytest.raises(SpecError, match="no training case is of the class 'thick'"):
        finetune(make_recipe(archive, labels=1, seed=1), tmp_path)
    build = classification.build_classifier

    def broken(*args):
        model = build(*args)
        model.head.bias.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(classification, "build_classifier", broken)
    with pytest.raises(NonFiniteLossError, match=r"step 1: the loss is nan; look at train_0"):
        finetune(recipe, tmp_path / "nan")


def run_command(monkeypatch, capfd, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["medmim-train", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capfd.readouterr()
    assert not end.value.code, captured.err
    return captured.out


def test_a_model_is_for_the_modality_that_it_was_trained_for(archive):
    volume = {**VOLUME, "intensity": {**VOLUME["intensity"], "PET": {"kind": "percentile"}}}
    for modality, expected in ((None, ("MR", "PET")), ("PET", ("PET",))):
        model = classification.build_classifier(make_recipe(archive, volume=volume, modality=modality), CLASSES)
        assert model.spec.volume.modalities == expected


def test_the_command(archive, tmp_path, monkeypatch, capfd):
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe("nowhere", schedule={"steps": 1}).to_yaml())
    out = run_command(monkeypatch, capfd, "finetune", path, f"data={archive}", "-o", tmp_path / "run")
    assert "step 1: AUC" in out
    assert f"medmim classify SCAN -o classes.csv -m local-dir:{tmp_path / 'run' / 'model'}" in out


def test_a_run_keeps_its_classes(tmp_path):
    """With another name classes are numbered otherwise, and what was learned of one would count for another."""
    rows = [f"{i}.nii.gz,{CLASSES[i % 2]},{'val' if i > 3 else 'train'}" for i in range(6)]
    write_list(tmp_path / "list.csv", rows, "image,label,split")
    for i in range(6):
        nib.Nifti1Image(rod(i, thick=i % 2 == 0), np.eye(4)).to_filename(tmp_path / f"{i}.nii.gz")
    recipe = make_recipe(tmp_path / "list.csv", classes=(), schedule={"steps": 1})
    finetune(recipe, tmp_path / "run")
    write_list(tmp_path / "list.csv", [row.replace("thick", "wide") for row in rows], "image,label,split")
    with pytest.raises(
        SpecError, match=r"split\.json: the run began with the classes thick, thin, and the data now has thin, wide"
    ):
        finetune(recipe, tmp_path / "run")
    split = tmp_path / "run" / "split.json"
    split.write_text(json.dumps({k: v for k, v in json.loads(split.read_text()).items() if k != "classes"}))
    claim_split(split, ClassificationTask(recipe).split, ("thin", "wide"))  # of a medmim that did not note them


def test_only_segmentation_is_measured_by_the_command_test(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe.yaml").write_text(make_recipe("x").to_yaml())
    with pytest.raises(SpecError, match="is a run of classification, and only segmentation is measured so"):
        evaluate_run(tmp_path)


# --- probes -----------------------------------------------------------------------------------------------------------


def test_probes_read_the_scans_once_and_the_test_only_when_asked(archive, tmp_path, monkeypatch, capfd):
    settings = {"data": str(archive), "model": MODEL, "volume": VOLUME, "modality": "MR"}
    recipe = ProbeRecipe.model_validate(settings | {"model": {**MODEL, "args": MODEL["args"] | {"global_pool": "avg"}}})
    results = probing.probe(recipe, tmp_path)
    assert [(each.probe, each.side, each.cases) for each in results] == [
        ("knn", "validation", 8), ("knn", "validation", 8), ("logistic", "validation", 8),
    ]  # fmt: skip
    assert not (tmp_path / "test.safetensors").exists()
    data = json.loads((tmp_path / "probe.json").read_text(encoding="utf-8"))
    assert data[2]["auc"] == results[2].scores.auc
    with open(tmp_path / "probe.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 9

    def refuse(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr(torch, "stack", refuse)
    assert probing.probe(recipe, tmp_path) == results
    other = recipe.model_copy(update={"volume": recipe.volume.model_copy(update={"spacing": (1, 1, 1)})})
    heads = recipe.model.args | {"num_heads": 1}  # of the same weights
    heads = recipe.model_copy(update={"model": recipe.model.model_copy(update={"args": heads})})
    for changed in (other, heads, recipe.model_copy(update={"seed": 1})):
        with pytest.raises(AssertionError, match="encoded again"):
            probing.probe(changed, tmp_path)
    monkeypatch.undo()

    given = [
        "--scratch",
        f"data={archive}",
        "modality=MR",
        *(f"model.args.{k}={v}" for k, v in (("depth", 1), ("img_size", [16, 32, 16]))),
    ]
    out = run_command(
        monkeypatch,
        capfd,
        "probe",
        "vit_t_mae3d",
        *given,
        "volume={intensity: {MR: {kind: zscore}}}",
        "--split",
        "test",
        "-o",
        tmp_path,
    )
    assert "6 test" in out
    run_command(monkeypatch, capfd, "probe", "vit_t_mae3d", *given, "-o", tmp_path)  # as the weights of that name
    assert len(json.loads((tmp_path / "probe.json").read_text(encoding="utf-8"))) == 3
    unprepared = settings | {"volume": None, "model": MODEL | {"name": "vit_t_mae3d_p8"}}
    with pytest.raises(SpecError, match="vit_t_mae3d_p8: nothing says how to prepare a scan; give volume="):
        probing.probe(ProbeRecipe.model_validate(unprepared), tmp_path)


def test_probes_encode_a_series_anew_when_its_slices_are_others(tmp_path, monkeypatch):
    rows = [f"{i},{i % 2},{'val' if i > 3 else 'train'}" for i in range(6)]
    write_list(tmp_path / "list.csv", rows, "image,label,split")
    for i in range(6):
        write_dicom(tmp_path / str(i), rod(i, thick=i % 2 == 0).astype(np.int16), np.eye(4))
    settings = {"data": str(tmp_path / "list.csv"), "model": MODEL, "volume": VOLUME, "modality": "MR"}
    recipe = ProbeRecipe.model_validate(settings)
    first = probing.probe(recipe, tmp_path / "probe")
    encoded, stack = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors: encoded.append(len(tensors)) or stack(tensors))
    assert probing.probe(recipe, tmp_path / "probe") == first
    assert not encoded
    file = next((tmp_path / "2").iterdir())
    os.utime(file, ns=(0, 0))  # as another program would write over it: the folder does not change
    probing.probe(recipe, tmp_path / "probe")
    assert encoded


def test_probes_name_the_neighbours_that_they_asked_and_a_scan_that_is_missing(tmp_path):
    rows = [f"{i}.nii.gz,{i % 2},{'val' if i > 3 else 'train'}" for i in range(6)]
    write_list(tmp_path / "list.csv", rows, "image,label,split")
    for i in range(6):
        nib.Nifti1Image(rod(i, thick=i % 2 == 0), np.eye(4)).to_filename(tmp_path / f"{i}.nii.gz")
    settings = {"data": str(tmp_path / "list.csv"), "model": MODEL, "volume": VOLUME, "modality": "MR"}
    recipe = ProbeRecipe.model_validate(settings)
    nearest = [each for each in probing.probe(recipe, tmp_path / "probe") if each.probe == "knn"]
    assert [each.setting for each in nearest] == [4]
    (tmp_path / "2.nii.gz").unlink()
    with pytest.raises(ScanError, match=r"2\.nii\.gz: cannot be read"):
        probing.probe(recipe, tmp_path / "probe")


def test_probes_against_neighbours_counted_otherwise(archive, tmp_path):
    """The features are the encoder's pooled output, and a neighbour's vote is its class."""
    recipe = ProbeRecipe.model_validate({"data": str(archive), "model": MODEL, "volume": VOLUME, "modality": "MR"})
    result = probing.probe(recipe, tmp_path)[0]
    torch.manual_seed(0)
    model = medmim.create_model("vit_t_mae3d", **MODEL["args"]).eval()
    transform = medmim.create_transform(model, modality="MR", volume=recipe.volume)
    stored = np.load(archive)

    @torch.no_grad()
    def encode(side):
        return torch.nn.functional.normalize(torch.cat([model(transform(x)[None]) for x in stored[f"{side}_images"]]))

    nearest = (encode("val") @ encode("train").mT).topk(5).indices.numpy()
    votes = stored["train_labels"].ravel()[nearest].mean(axis=1)
    assert result.scores.auc == pytest.approx(roc_auc_score(stored["val_labels"].ravel(), votes))
