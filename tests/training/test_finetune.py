"""Fine-tuning for segmentation on volumes made by formula: splits without leaks, crops, scores, the loop."""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import shutil
import signal
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from monai.losses import DiceCELoss
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter
from test_engine import Interrupted, stop_at

import medmim
from fakes import RECORD, tiny_model
from medmim.errors import ScanError, SpecError
from medmim.segmentation import segment
from medmim.transforms import VolumeTransform
from medmim.volumes import load_volume
from medmim_training import cli
from medmim_training.engine import NonFiniteLossError
from medmim_training.preemption import Preempted
from medmim_training.recipe import list_recipes, load_recipe
from medmim_training.tasks import classification, evaluation, metrics, segmentation
from medmim_training.tasks.cases import (
    LoadedCase,
    choose,
    find_cases,
    find_classes,
    load_case,
    load_labels,
    pad_around,
    split_cases,
    with_splits,
)
from medmim_training.tasks.crops import LabelledCrops
from medmim_training.tasks.evaluation import cases_of, evaluate_run, evaluate_segmenter
from medmim_training.tasks.finetuning import finetune
from medmim_training.tasks.loop import Run
from medmim_training.tasks.metrics import bootstrap_interval, mean_of_cases, score_case
from medmim_training.tasks.recipe import CropSection, FineTuneRecipe, SegmentationRecipe

CLASSES = ("background", "ball", "box")
PLAIN = CropSection(rotate=0, scale=0, appearance=0)


def write_case(folder, name: str, seed: int, shape=(20, 28, 24)) -> None:
    """A bright ball and a brighter box somewhere in dim texture."""
    generator = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    centre = generator.uniform(6, np.array(shape) - 6)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    labels[((index - centre) ** 2).sum(-1) < 30] = 1
    corner = generator.integers(0, np.array(shape) - 7)
    labels[tuple(slice(c, c + 7) for c in corner)] = 2
    image = gaussian_filter(generator.normal(100, 60, shape), 1) + 150.0 * labels
    affine = np.diag([2.0, -2.0, 2.0, 1.0])
    for kind, array in (("imagesTr", image.astype(np.float32)), ("labelsTr", labels)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nib.Nifti1Image(array, affine).to_filename(folder / kind / f"{name}.nii.gz")


def write_splits(path, rows: dict[str, tuple[str, int, str]]) -> None:
    lines = ["case,subject_group,fold,split", *(f"{name},{g},{f},{s}" for name, (g, f, s) in rows.items())]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Eight cases of six subjects in two folds; one subject is for the test."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = {}
    for i in range(8):
        write_case(folder, f"case_{i}", seed=i)
        subject = i // 2 if i < 4 else i
        rows[f"case_{i}"] = (f"s{subject}", subject % 2, "test" if i == 7 else "train")
    write_splits(folder / "subjects.csv", rows)
    return folder


# Of every tiny run, whatever its task.
RUN = {
    "name": "tiny",
    "summary": "seconds",
    "optimizer": {"lr": 1e-2, "layer_decay": 0.8},
    "head_warmup": 3,
    "precision": "fp32",
}


def make_recipe(data, **changes) -> SegmentationRecipe:
    recipe = {
        **RUN,
        "data": str(data),
        "classes": CLASSES,
        "model": {
            "name": "vit_t_mae3d",
            "pretrained": False,
            "args": {
                "img_size": (16, 24, 24),
                "patch_size": (4, 8, 8),
                "embed_dim": 24,
                "depth": 2,
                "num_heads": 2,
                "drop_path_rate": 0.2,
            },
        },
        "decoder": {"name": "light", "args": {"width": 4}},
        "volume": {"spacing": (2, 2, 2), "intensity": {"MR": {"kind": "percentile"}}},
        "schedule": {"steps": 12, "warmup": 2},
        "output": {"log_every": 1, "checkpoint_every": 4},
    }
    return SegmentationRecipe.model_validate(recipe | changes)


@pytest.fixture(scope="session")
def recipe(data):
    return make_recipe(data)


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory):
    """The best model and the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finetuned")
    return finetune(recipe, folder), folder


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_recipes(FineTuneRecipe))
def test_packaged_recipes_are_valid(name):
    recipe = load_recipe(name, ["data=somewhere", "labels=10%", "seed=3"], kind=FineTuneRecipe)
    assert recipe.name == name
    assert (recipe.labels, recipe.seed) == ("10%", 3)
    recipe = recipe.model_copy(
        update={"classes": CLASSES, "model": recipe.model.model_copy(update={"pretrained": False})}
    )
    if recipe.task == "segmentation":
        model = segmentation.build_segmenter(recipe)
    else:
        model = classification.build_classifier(recipe, CLASSES)
    assert (model.spec.task.kind, model.spec.task.classes) == (recipe.task, CLASSES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("label=10%", "label is no key of a recipe; did you mean 'labels'"),
        ("crops.rotat=3", "crops.rotat is no key of a recipe; did you mean 'rotate'"),
        ("labels=ten", "neither a share such as 10% nor a number"),
        ("labels=0%", "neither a share such as 10% nor a number"),
        ("labels=0", "labels: .* 0 is neither a share such as 10% nor a number"),
        ("labels=1.5", r"labels: .* 1\.5 is neither a share such as 10% nor a number"),
        ("labels=true", "labels: .* True is neither a share such as 10% nor a number"),
        ("seed=99999999999999", "seed: Input should be less than"),
        ("decoder.name=vnet", "decoder.name"),
        ("output.trackers=[wandb]", "fine-tuning has no trackers"),
        ("output.pictures_every=5", "output: .*fine-tuning draws one at each validation"),
        ("volume={spacin: [1,1,1], intensity: {CT: {kind: zscore}}}", "volume.spacin .* did you mean 'spacing'"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(SpecError, match=message):
        load_recipe("finetune/vit_t_unetr", ["data=somewhere", override], kind=FineTuneRecipe)


def test_a_task_that_is_no_word_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: n\nsummary: s\ntask: [segmentation]\n")
    with pytest.raises(SpecError, match=r"r\.yaml: task: Input should be 'segmentation' or 'classification'"):
        load_recipe(str(path), kind=FineTuneRecipe)


def test_a_recipe_of_the_other_kind_is_refused():
    with pytest.raises(SpecError, match=r"small/vit_t_mae3d\.yaml: "):
        load_recipe("small/vit_t_mae3d", kind=FineTuneRecipe)
    assert not set(list_recipes()) & set(list_recipes(FineTuneRecipe))


def test_how_many_labels_a_share_is(recipe):
    def count(labels, cases=158):
        return SegmentationRecipe.model_validate({**recipe.model_dump(), "labels": labels}).count_labels(cases)

    assert (count("10%"), count("100%"), count("0.1%"), count(7), count(200)) == (16, 158, 1, 7, 158)


# --- cases and splits -------------------------------------------------------------------------------------------------


def test_subjects_stay_together_and_the_test_stays_out(data):
    cases = find_cases(data)
    split = split_cases(cases, 0, source="x")
    assert [case.name for case in split.test] == ["case_7"]
    groups = [group for side in (split.training, split.validation, split.test) for group in {c.group for c in side}]
    assert len(set(groups)) == len(groups)
    assert {case.name for side in (split.training, split.validation, split.test) for case in side} == {
        f"case_{i}" for i in range(8)
    }
    other = split_cases(cases, 1, source="x")
    assert set(other.training) == set(split.validation)
    assert set(other.validation) == set(split.training)


def test_a_subject_on_two_sides_is_refused(data, tmp_path):
    rows = {f"case_{i}": (f"s{i}", i % 2, "train") for i in range(8)}
    for second, split in (("case_1", "train"), ("case_2", "test")):
        write_splits(tmp_path / "s.csv", {**rows, second: ("s0", int(second[-1]) % 2, split)})
        with pytest.raises(SpecError, match=r"s\.csv: subject s0 is in more than one"):
            split_cases(find_cases(data, tmp_path / "s.csv"), 0, source="s.csv")


def test_a_scan_of_several_cases_on_two_sides_is_refused(tmp_path):
    rows = [f"a.nii,{i}.nii,reader {i}" for i in range(9)]
    (tmp_path / "list.csv").write_text("\n".join(["image,label,case", *rows, "b.nii,b.nii,b"]))
    with pytest.raises(SpecError, match=r"x: .*a\.nii is in more than one of .*give its cases one subject_group"):
        split_cases(find_cases(tmp_path / "list.csv"), 0, source="x")
    rows = [f"{row},a" for row in rows]
    (tmp_path / "list.csv").write_text("\n".join(["image,label,case,subject_group", *rows, "b.nii,b.nii,b,b"]))
    cases = find_cases(tmp_path / "list.csv")
    assert {len(split_cases(cases, fold, source="x").validation) for fold in {case.fold for case in cases}} == {1, 9}


def test_folds_are_drawn_by_subject_where_none_are_given(data, tmp_path):
    (tmp_path / "s.csv").write_text("case,subject_group\n" + "".join(f"case_{i},s{i // 2}\n" for i in range(8)))
    cases = find_cases(data, tmp_path / "s.csv")
    assert cases == find_cases(data, tmp_path / "s.csv")
    assert len({case.fold for case in cases}) == 4
    assert all(cases[i].fold == cases[i + 1].fold for i in range(0, 8, 2))


def test_folds_are_as_large_whoever_is_kept_for_the_test(data, tmp_path):
    (tmp_path / "s.csv").write_text("case,split\n" + "".join(f"case_{i},{'test' * (i > 4)}\n" for i in range(8)))
    cases = find_cases(data, tmp_path / "s.csv")
    assert sorted(case.fold for case in cases if not case.is_test) == [0, 1, 2, 3, 4]


def test_a_csv_of_images_and_labels(data, tmp_path):
    names = [f"case_{i}" for i in range(3)]
    rows = [f"{data}/imagesTr/{n}.nii.gz,{data}/labelsTr/{n}.nii.gz,{i}" for i, n in enumerate(names)]
    (tmp_path / "list.csv").write_text("image,label,fold\n" + "\n".join(rows) + "\n")
    cases = find_cases(tmp_path / "list.csv")
    assert [(case.name, case.fold) for case in cases] == [("case_0", 0), ("case_1", 1), ("case_2", 2)]
    assert cases[1].image.is_file()


def test_folds_as_pandas_writes_them(data, tmp_path):
    rows = [f"case_{i},{'' if i == 7 else f'{i % 2}.0'},{'test' if i == 7 else 'train'}" for i in range(8)]
    (tmp_path / "s.csv").write_text("\n".join(["case,fold,split", *rows]) + "\n")
    assert [case.fold for case in find_cases(data, tmp_path / "s.csv")][:7] == [0, 1, 0, 1, 0, 1, 0]


def test_fewer_labels_are_among_more(data):
    cases = find_cases(data)
    few, many = choose(cases, 2, seed=5), choose(cases, 5, seed=5)
    assert set(few) < set(many)
    assert choose(cases, 2, seed=5) == few != choose(cases, 2, seed=6)


def test_what_is_wrong_with_the_data_is_said(data, tmp_path):
    with pytest.raises(SpecError, match="neither a folder"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(SpecError, match="no scans in imagesTr"):
        find_cases(tmp_path)
    write_splits(tmp_path / "s.csv", {"case_0": ("a", 0, "train")})
    with pytest.raises(SpecError, match=r"s\.csv: says nothing of case_1"):
        find_cases(data, tmp_path / "s.csv")
    (tmp_path / "no_case.csv").write_text("name,fold\n")
    with pytest.raises(SpecError, match="needs the column case"):
        find_cases(data, tmp_path / "no_case.csv")
    with pytest.raises(SpecError, match=r"fold 9 leaves nobody .*\[0, 1\]"):
        split_cases(find_cases(data), 9, source="x")
    with pytest.raises(SpecError, match="nothing names the classes"):
        find_classes(data, ())


FOUR = "case,fold,split\ncase_0,0,train\ncase_1,1,train\ncase_2,0,train\ncase_3,,test\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FOUR.replace("test", "testing"), "the split of case_3 is 'testing', which is none of train, training, val"),
        (FOUR.replace("case_2,0", "case_2,"), "gives case_2 no fold, as it does others"),
        (FOUR + "case_3,0,train\n", "has two rows for case_3"),
        (FOUR.replace("case_1,1", "case_1,one"), "the fold of case_1 is 'one', not a number"),
        (FOUR.replace("case_1", ""), "row 2 has nothing in the column case"),
        (FOUR.replace("train", "tr\u00e4in").encode("latin-1"), "not readable as CSV in UTF-8"),
        (FOUR.replace("fold,split", "number,set"), "has none of the columns fold, split, subject_group"),
        (FOUR.replace("fold,split", "Split,split"), "two columns are called split; leave one"),
    ],
)
def test_a_split_that_is_not_clear_is_refused(data, tmp_path, text, message):
    """Whatever it means, nobody who is kept for the test may train for want of a word."""
    cases = [case for case in find_cases(data) if case.name in FOUR]
    path = tmp_path / "s.csv"
    path.write_bytes(FOUR.encode("utf-8-sig").replace(b"test", b" Test"))  # as spreadsheets and people write it
    assert [case.is_test for case in with_splits(cases, None, path, source="x")] == [False] * 3 + [True]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError, match=rf"s\.csv: .*{message}"):
        with_splits(cases, None, path, source="x")


def test_spaces_and_capitals_change_no_split(data, tmp_path):
    rows = [f"case_{i}, {i % 2}, {'Test' if i == 7 else 'train'}, s{i % 7}{' ' * (i == 7)}" for i in range(8)]
    (tmp_path / "s.csv").write_text("\n".join(["Case, Fold, Split, subject_group", *rows]) + "\n")
    cases = find_cases(data, tmp_path / "s.csv")
    assert [case.fold for case in cases][:7] == [0, 1, 0, 1, 0, 1, 0]
    assert [case.is_test for case in cases] == [False] * 7 + [True]
    with pytest.raises(SpecError, match="subject s0 is in more than one"):
        split_cases(cases, 0, source="x")


def test_two_cases_of_one_name_are_refused(data, tmp_path):
    """Or the word of one would count for both, and the test scan of one train."""
    rows = "".join(f"{side}/img.nii.gz,{side}/label.nii.gz,{side}\n" for side in ("test", "train"))
    (tmp_path / "list.csv").write_text("image,label,split\n" + rows)
    with pytest.raises(SpecError, match=r"list\.csv: two cases are called img; give each a name"):
        find_cases(tmp_path / "list.csv")


def test_dots_in_the_name_of_a_series_belong_to_it(tmp_path):
    """Those of one study differ in nothing but the last number."""
    series = [f"1.2.840.{number}" for number in (1, 2)]
    (tmp_path / "list.csv").write_text("image,label\n" + "".join(f"{name},{name}.nii.gz\n" for name in series))
    assert [case.name for case in find_cases(tmp_path / "list.csv")] == series


def test_classes_of_the_decathlon(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "2": "box", "1": "ball"}}))
    assert find_classes(tmp_path, ()) == CLASSES
    assert find_classes(tmp_path, ("a", "b")) == ("a", "b")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "3": "box"}}))
    with pytest.raises(SpecError, match="without gaps"):
        find_classes(tmp_path, ())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("background", "ball", "ball"), "two classes are called 'ball'"),  # whose scores would be one
        (("background", "mean"), "no class may be called 'mean'"),
    ],
)
def test_classes_whose_results_would_be_lost_are_refused(tmp_path, names, message):
    with pytest.raises(SpecError, match=message):
        find_classes(tmp_path, names)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": dict(enumerate(names))}))
    with pytest.raises(SpecError, match=message):
        find_classes(tmp_path, ())


def test_labels_that_do_not_fit_are_refused(data, tmp_path):
    transform = VolumeTransform(make_recipe(data).volume, (1, 1, 1), fit="pad")
    case = find_cases(data)[0]
    loaded = load_case(case, transform, num_classes=3)
    expected = np.flip(np.asarray(nib.load(case.label).dataobj), axis=1)  # the file's axes are RPS
    np.testing.assert_array_equal(loaded.labels.numpy(), expected)
    with pytest.raises(ScanError, match=r"case_0\.nii\.gz: labels must be 0 to 1, one a class, but it holds 2"):
        load_case(case, transform, num_classes=2)
    write_case(tmp_path, "case_0", 0, shape=(21, 28, 24))
    other = find_cases(tmp_path)[0]
    with pytest.raises(ScanError, match="does not lie on its scan"):
        load_case(type(case)("x", case.image, other.label, "x"), transform, num_classes=3)


def test_more_classes_than_a_byte_has_numbers(tmp_path):
    write_case(tmp_path, "case_0", 0)
    (case,) = find_cases(tmp_path)
    stored = nib.load(case.label)
    many = nib.Nifti1Image(np.asarray(stored.dataobj).astype(np.int16) * 149, stored.affine)
    nib.save(many, case.label)
    transform = VolumeTransform(make_recipe(tmp_path).volume, (1, 1, 1), fit="pad")
    loaded = load_case(case, transform, num_classes=300)
    assert loaded.labels.unique().tolist() == [0, 149, 298]
    crops = LabelledCrops([loaded], (16, 24, 32), length=4, seed=0, settings=PLAIN)
    assert {label for i in range(4) for label in crops[i]["labels"].unique().tolist()} == {0, 149, 298}


# --- crops ------------------------------------------------------------------------------------------------------------


def shapes(shape=(20, 28, 24)) -> LoadedCase:
    labels = torch.zeros(shape, dtype=torch.uint8)
    labels[3, 4, 5] = 1
    labels[10:, 20:, 20:] = 2
    return LoadedCase("one", torch.rand(1, *shape) + 1 + labels, labels, (1.0, 1.0, 1.0))


def test_a_sample_is_decided_by_its_number():
    cases = [shapes(), shapes((30, 20, 20))]
    first, again = (
        LabelledCrops(cases, (16, 24, 24), length=6, seed=1, settings=CropSection(mirror_axes=(0,))) for _ in range(2)
    )
    forwards, backwards = [first[i] for i in range(6)], [again[i] for i in reversed(range(6))][::-1]
    for one, two in zip(forwards, backwards, strict=True):
        assert one["x"].shape == one["labels"].shape == (1, 16, 24, 24)
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(forwards[0]["x"], forwards[1]["x"])
    elsewhere = pickle.loads(pickle.dumps(first))  # as a process that reads ahead gets them
    assert all(torch.equal(elsewhere[4][key], forwards[4][key]) for key in forwards[4])


def test_crops_hold_a_class_and_labels_stay_on_their_voxels():
    settings = PLAIN.model_copy(update={"foreground": 1.0})
    crops = LabelledCrops([shapes()], (6, 6, 6), length=60, seed=0, settings=settings)
    seen = [set(crops[i]["labels"].unique().tolist()) for i in range(60)]
    assert all(labels & {1, 2} for labels in seen)
    assert 15 < sum(1 in labels for labels in seen) < 45  # one voxel is drawn as often as a block
    for i in range(20):
        sample = crops[i]
        assert torch.equal(
            (sample["x"] - 1).floor().clamp(max=2), sample["labels"]
        )  # values are label + 1 + less than 1


def test_rotated_labels_are_labels_and_follow_the_image():
    crops = LabelledCrops([shapes()], (16, 16, 16), length=20, seed=0, settings=CropSection(appearance=0))
    for i in range(20):
        labels = crops[i]["labels"]
        assert set(labels.unique().tolist()) <= {0, 1, 2}
        inside = distance_transform_edt(labels[0] == 2) > 2
        assert not inside.any() or crops[i]["x"][0][inside].min() > 2.5


def test_small_cases_lie_in_the_middle_as_in_prediction():
    case = shapes((10, 11, 12))
    padded, inside = pad_around(case.x, (16, 24, 12), value=-1)
    assert padded.shape == (1, 16, 24, 12)
    assert torch.equal(padded[:, *inside], case.x)
    transform = VolumeTransform(
        medmim.VolumeSpec.parse({"intensity": {"MR": {"kind": "zscore"}}}, source="x"), (16, 24, 12), fit="pad"
    )
    theirs = transform(case.x.numpy())
    low = float(theirs.min())
    assert torch.equal(pad_around(theirs.as_tensor()[:, *inside], (16, 24, 12), value=low)[0], theirs.as_tensor())


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_against_distances_computed_otherwise():
    generator = np.random.default_rng(0)
    smooth = gaussian_filter(generator.normal(size=(2, 18, 22, 20)), (0, 3, 3, 3))
    ours, theirs = (torch.from_numpy((each > 0.01).astype(np.uint8)) for each in smooth)
    spacing = (1.0, 2.0, 0.5)
    (score,) = score_case("a", ours, theirs, classes=("background", "one"), spacing=spacing)
    a, b = ours.numpy() > 0, theirs.numpy() > 0
    assert score.dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))

    def surface(inside):
        return inside & ~binary_erosion(inside)

    to_b = distance_transform_edt(~surface(b), sampling=spacing)[surface(a)]
    to_a = distance_transform_edt(~surface(a), sampling=spacing)[surface(b)]
    assert score.hd95 == pytest.approx(max(np.percentile(to_b, 95), np.percentile(to_a, 95)), rel=1e-4)


def test_classes_that_are_missing():
    nothing, something = torch.zeros(2, 3, 4, 12, dtype=torch.uint8)
    something = something.clone()
    something[0] = 1
    classes, spacing = CLASSES, (1.0, 1.0, 1.0)
    one, two = score_case("a", nothing, something, classes=classes, spacing=spacing)
    assert (one.dice, one.hd95) == (0.0, 13.0)
    assert math.isnan(two.dice)
    assert math.isnan(two.hd95)
    (perfect, _) = score_case("b", something, something, classes=classes, spacing=spacing)
    assert (perfect.dice, perfect.hd95) == (1.0, 0.0)
    assert mean_of_cases([one, two, perfect], "dice").tolist() == [0.0, 1.0]


def test_the_interval_covers_the_mean_and_narrows():
    values = np.random.default_rng(0).normal(0.8, 0.1, 200)
    few, many = bootstrap_interval(values[:20]), bootstrap_interval(values)
    assert few[0] < values[:20].mean() < few[1]
    assert many[1] - many[0] < few[1] - few[0]
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(200), rel=0.2)
    assert bootstrap_interval(values) == many


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_it_learns_more_than_how_frequent_the_classes_are(data, tmp_path):
    """A network that looks at nothing can predict how frequent the classes are, or one class everywhere."""
    recipe = make_recipe(
        data,
        decoder={"name": "unetr", "args": {"feature_size": 8}},
        crops=PLAIN.model_dump(),
        schedule={"steps": 20, "warmup": 2},
        output={"log_every": 1, "checkpoint_every": 20},
        head_warmup=0,
    )
    transform = VolumeTransform(recipe.volume, (1, 1, 1), fit="pad")
    split = split_cases(find_cases(data), 0, source="x")
    training, validation = (
        [load_case(case, transform, num_classes=3) for case in cases] for cases in (split.training, split.validation)
    )
    crops = LabelledCrops(training, (16, 24, 24), length=40, seed=0, settings=PLAIN)
    labels = torch.stack([crops[i]["labels"] for i in range(len(crops))])  # (N, 1, D, H, W)
    frequencies = torch.stack([(labels == label).float().mean() for label in range(3)])
    blind = frequencies.log().view(1, 3, 1, 1, 1).expand(len(labels), -1, *labels.shape[2:])
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def dice_of_one_class(label):
        found = [2 * float((case.labels == label).sum() / (case.labels.numel() + (case.labels == label).sum()))
                 for case in validation]  # fmt: skip
        return np.mean(found) / 2  # mean over the two classes, of which the other one has none

    finetune(recipe, tmp_path)
    losses = [line["loss"] for line in lines(tmp_path / "metrics.jsonl")]
    assert np.mean(losses[-5:]) < 0.75 * float(loss(blind, labels))
    assert lines(tmp_path / "validation.jsonl")[-1]["dice"] > 2 * max(dice_of_one_class(label) for label in (1, 2))


def test_what_a_run_leaves(finished, data):
    model, folder = finished
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "best.pt", "step-00000008.pt", "step-00000012.pt",
    ]  # fmt: skip
    assert len(list((folder / "pictures").iterdir())) == 3
    validations = lines(folder / "validation.jsonl")
    assert [each["step"] for each in validations] == [4, 8, 12]
    best = max(validations, key=lambda each: each["dice"])
    assert best["dice_interval"][0] <= best["dice"] <= best["dice_interval"][1]
    with open(folder / "scores.csv", newline="") as file:
        scores = list(csv.DictReader(file))
    validated = json.loads((folder / "split.json").read_text())["validation"]
    assert [(row["case"], row["label"]) for row in scores] == [(n, c) for n in validated for c in CLASSES[1:]]
    assert all(float(row["hd95"]) >= 0 or row["dice"] == "nan" for row in scores)
    means = {n: np.nanmean([float(row["dice"]) for row in scores if row["case"] == n]) for n in validated}
    assert np.mean(list(means.values())) == pytest.approx(best["dice"], abs=1e-5)

    loaded = medmim.from_pretrained(folder / "model")
    assert loaded.spec.task.classes == CLASSES
    assert all(torch.equal(one, two) for one, two in zip(loaded.parameters(), model.parameters(), strict=True))
    # The scores of the run are those of the saved model on the scan's own voxels: nothing is resampled here.
    case = next(case for case in find_cases(data) if case.name == validated[0])
    result = segment(loaded, case.image)
    truth = np.asarray(nib.load(case.label).dataobj)
    ball = 2 * ((result.labels == 1) & (truth == 1)).sum() / max(1, ((result.labels == 1).sum() + (truth == 1).sum()))
    assert ball == pytest.approx(float(scores[0]["dice"]), abs=1e-4)


def test_distances_are_measured_of_the_best_model_alone(recipe, tmp_path, monkeypatch):
    measured, measure = [], metrics._hd95
    monkeypatch.setattr(metrics, "_hd95", lambda *given: measured.append(given) or measure(*given))
    before = []
    finetune(recipe, tmp_path, watch_validation=lambda found: before.append(len(measured)))
    assert before == [0, 0, 0]
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(float(row["dice"]) > 0 for row in rows) <= len(measured) <= len(rows)
    assert measured


def test_a_class_that_no_training_case_has_is_refused_and_the_folder_is_left_free(tmp_path):
    for number in range(2):
        write_case(tmp_path, f"case_{number}", seed=number)
    with pytest.raises(SpecError, match="no case that trains has the class 'tumour'"):
        finetune(make_recipe(tmp_path, classes=(*CLASSES, "tumour")), tmp_path / "run")
    steps = {"steps": 1}
    finetune(make_recipe(tmp_path, schedule=steps), tmp_path / "run")
    with pytest.raises(SpecError, match="another recipe ran here"):
        finetune(make_recipe(tmp_path, schedule=steps, classes=(*CLASSES, "tumour")), tmp_path / "run")


def test_one_subject_cannot_train_and_validate(tmp_path):
    write_case(tmp_path, "case_0", seed=0)
    with pytest.raises(SpecError, match="it takes two besides the test"):
        finetune(make_recipe(tmp_path), tmp_path / "run")


def test_a_gradient_that_is_no_number_is_refused_before_it_is_saved(recipe, tmp_path, monkeypatch):
    run = Run(segmentation.SegmentationTask(recipe), tmp_path)
    next(run.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteLossError, match=r"step 4: the gradient is nan; look at case_\d"):  # after the warm-up
        run.train()
    assert all(weight.isfinite().all() for weight in run.model.parameters())
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("step", [2, 7])
def test_a_killed_run_resumes_bit_for_bit(finished, recipe, tmp_path, step):
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path, watch=stop_at(step))
    resumed = finetune(recipe, tmp_path).state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in finished[0].state_dict().items())
    for name in ("validation.jsonl", "scores.csv"):
        assert (tmp_path / name).read_text() == (finished[1] / name).read_text()
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [
        line["loss"] for line in lines(finished[1] / "metrics.jsonl")
    ]


def test_the_best_model_is_there_when_a_run_is_killed_beside_its_first_checkpoint(recipe, tmp_path, monkeypatch):
    """Whatever is killed between the checkpoint and the name of the best, later validations may all be worse."""
    rename = os.replace

    def killed(source, target):
        rename(source, target)
        if str(target).endswith("step-00000004.pt"):
            raise Interrupted

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path)
    assert torch.load(tmp_path / "checkpoints/best.pt", weights_only=True)["step"] == 4


def test_a_run_keeps_its_cases(finished, data, tmp_path):
    """With other cases, those that trained could validate: folds that are drawn change with each case that is added."""
    copied = shutil.copytree(data, tmp_path / "data")
    recipe = make_recipe(copied, schedule={"steps": 2}, output={"checkpoint_every": 2})
    finetune(recipe, tmp_path / "run")
    text = (copied / "subjects.csv").read_text()
    (copied / "subjects.csv").write_text(text.replace("s4,0,train", "s4,1,train").replace("s5,1,train", "s5,0,train"))
    with pytest.raises(SpecError, match=r"split\.json: the run began with other cases for training, validation"):
        finetune(recipe, tmp_path / "run")
    with pytest.raises(
        SpecError, match=r"split\.json: the run has seen case_5, which the data now keeps for validation"
    ):
        evaluate_run(tmp_path / "run", "validation")
    (copied / "subjects.csv").write_text(text.replace("s4,0,train", "s4,0,test"))
    with pytest.raises(SpecError, match=r"split\.json: the run has seen case_4, which the data now keeps for test"):
        evaluate_run(tmp_path / "run")


def test_sigterm_saves_and_the_run_goes_on(finished, recipe, tmp_path):
    def terminate(report):
        if report.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="saved at step 5"):
        finetune(recipe, tmp_path, watch=terminate)
    finetune(recipe, tmp_path)
    last = [torch.load(f / "checkpoints/step-00000012.pt", weights_only=True) for f in (tmp_path, finished[1])]
    assert all(torch.equal(last[0]["method"][name], tensor) for name, tensor in last[1]["method"].items())


def test_a_frozen_encoder_and_the_warm_up_of_the_head(data, tmp_path, monkeypatch):
    recipe = make_recipe(data, frozen=True)
    before = segmentation.build_segmenter(recipe).state_dict()
    after = finetune(recipe, tmp_path / "frozen").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name.startswith("encoder."))
    assert not all(torch.equal(after[name], tensor) for name, tensor in before.items())

    warming = make_recipe(data, output={"log_every": 1, "checkpoint_every": 3})
    with pytest.raises(Interrupted):
        finetune(warming, tmp_path / "warming", watch=stop_at(5))
    third = torch.load(tmp_path / "warming/checkpoints/step-00000003.pt", weights_only=True)["method"]
    assert all(torch.equal(third[name], tensor) for name, tensor in before.items() if name.startswith("encoder."))


def test_layers_nearer_to_the_input_learn_more_slowly(recipe, tmp_path):
    run = Run(segmentation.SegmentationTask(recipe), tmp_path)
    run.schedule.step_update(2)
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    model = run.model
    head, block, stem = (
        rates[id(p)]
        for p in (
            model.decoder.to_classes.weight,
            model.encoder.blocks[0].mlp.fc1.weight,
            model.encoder.patch_embed.proj.weight,
        )
    )
    assert head > block > stem
    assert block / stem == pytest.approx(1 / 0.8)


def test_pretrained_weights_are_where_it_starts(data, tmp_path):
    encoder = tiny_model(img_size=(16, 24, 24), patch_size=(4, 8, 8), embed_dim=24, depth=2, num_heads=2)
    medmim.save_pretrained(encoder, tmp_path / "encoder", weights={**RECORD, "decoder_spec": None})
    model = {"name": f"local-dir:{tmp_path / 'encoder'}", "pretrained": True}
    recipe = make_recipe(data, model=model, volume=None, modality="MR", schedule={"steps": 1})
    built = segmentation.build_segmenter(recipe)
    assert torch.equal(built.encoder.norm.weight, encoder.norm.weight)
    assert all(torch.equal(p, q) for p, q in zip(built.encoder.parameters(), encoder.parameters(), strict=True))
    finetune(recipe, tmp_path / "run")
    loaded = medmim.from_pretrained(tmp_path / "run" / "model")
    assert loaded.spec.weights.license == RECORD["license"]
    assert loaded.spec.volume.spacing == tuple(RECORD["volume"]["spacing"])


def test_a_model_is_for_the_modality_that_it_was_trained_for(data, tmp_path):
    """A CT without air looks like MR, and was prepared so by whoever did not name it in prediction."""
    ct = {"kind": "window", "low": -1000, "high": 1000}
    volume = {"spacing": (2, 2, 2), "intensity": {"CT": ct, "MR": {"kind": "percentile"}}}
    scan = data / "imagesTr" / "case_7.nii.gz"
    for modality in (None, "CT"):
        finetune(make_recipe(data, volume=volume, modality=modality, schedule={"steps": 1}), tmp_path / str(modality))
        AcceleratorState._reset_state(reset_partial_state=True)
    model = medmim.from_pretrained(tmp_path / "CT" / "model")
    with pytest.raises(ScanError, match="seems to be MR, but these weights were trained on CT; pass modality="):
        segment(model, scan)
    assert segment(model, scan, modality="CT").labels.shape == (20, 28, 24)
    assert medmim.from_pretrained(tmp_path / "None" / "model").spec.volume.modalities == ("CT", "MR")


def test_what_cannot_be_run_is_said(recipe, data, finished, tmp_path, monkeypatch):
    with pytest.raises(SpecError, match="another recipe ran here"):
        finetune(make_recipe(data, seed=1), finished[1])
    with pytest.raises(SpecError, match="give volume= in the recipe"):
        finetune(make_recipe(data, volume=None), tmp_path / "volume")
    with pytest.raises(SpecError, match="precision fp16 needs a GPU"):
        finetune(make_recipe(data, precision="fp16"), tmp_path / "fp16")
    with pytest.raises(SpecError, match="adamx"):
        finetune(make_recipe(data, optimizer={"lr": 1e-3, "name": "adamx"}), tmp_path / "optimizer")
    build = segmentation.build_segmenter

    def broken(*args):
        model = build(*args)
        model.decoder.to_classes.bias.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(segmentation, "build_segmenter", broken)
    with pytest.raises(NonFiniteLossError, match=r"step 1: the loss is nan; look at case_"):
        finetune(recipe, tmp_path / "nan")


def test_the_command(data, tmp_path, monkeypatch, capfd):
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe("nowhere", schedule={"steps": 2}).to_yaml())
    arguments = ["finetune", str(path), f"data={data}", "labels=2", "seed=1"]
    arguments += ["modality=MR", "-o", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["medmim-train", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capfd.readouterr().out
    assert not end.value.code
    assert "Dice" in out
    assert f"local-dir:{tmp_path / 'run' / 'model'} --modality MR" in out
    assert len(json.loads((tmp_path / "run" / "split.json").read_text())["training"]) == 2


# --- the last evaluation ----------------------------------------------------------------------------------------------


def test_test_cases_are_scored_in_their_own_voxels(finished, data, tmp_path, monkeypatch, capfd):
    model, folder = finished
    monkeypatch.setattr(sys, "argv", ["medmim-train", "test", str(folder), "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "1 test cases" in capfd.readouterr().out
    with open(tmp_path / "test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (case,) = (case for case in find_cases(data) if case.is_test)
    assert [(row["case"], row["label"]) for row in rows] == [(case.name, name) for name in CLASSES[1:]]
    ours, theirs = segment(model, case.image).labels, np.asarray(nib.load(case.label).dataobj)
    for label, row in enumerate(rows, start=1):
        dice = 2 * ((ours == label) & (theirs == label)).sum() / ((ours == label).sum() + (theirs == label).sum())
        assert float(row["dice"]) == pytest.approx(dice, abs=1e-5)
    means = json.loads((tmp_path / "test.json").read_text())
    assert means["cases"] == 1
    assert means["results"]["mean"]["dice"][0] == pytest.approx(np.mean([float(row["dice"]) for row in rows]), abs=1e-5)


def test_a_run_that_cannot_be_written_to_is_said_before_its_test_cases_are_predicted(tmp_path, monkeypatch, capfd):
    (tmp_path / "run" / "test.json").mkdir(parents=True)
    monkeypatch.setattr(evaluation, "evaluate_run", None)
    monkeypatch.setattr(sys, "argv", ["medmim-train", "test", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        cli.main()
    assert "test.json: cannot be written (a folder has that name)" in capfd.readouterr().err


def test_labels_are_checked_in_the_last_evaluation_as_in_training(finished, data, tmp_path):
    (case,) = (case for case in find_cases(data) if case.is_test)
    stored = nib.load(case.label)
    flipped = nib.Nifti1Image(np.asarray(stored.dataobj)[::-1], stored.affine @ np.diag([-1.0, 1, 1, 1]))
    halves = nib.Nifti1Image(np.asarray(stored.dataobj) * np.float32(0.5), stored.affine)
    nearly = nib.Nifti1Image(np.minimum(stored.dataobj, np.float32(1.02)), stored.affine)
    for image, message in (
        (flipped, "does not lie on its scan"),
        (halves, r"labels must be 0 to 2.* holds 0\.5; save it as whole numbers"),
        (nearly, r"labels must be 0 to 2.* holds 1\.01999998; save it as whole numbers"),
    ):
        nib.save(image, tmp_path / "label.nii.gz")
        with pytest.raises(ScanError, match=rf"label\.nii\.gz: {message}"):
            evaluate_segmenter(finished[0], [replace(case, label=tmp_path / "label.nii.gz")])


def test_labels_that_a_header_scales_are_rounded(tmp_path):
    """As nibabel stores real numbers in bytes: with 0 to 2, what was 1 is read as 1.004."""
    labels = (np.arange(24).reshape(2, 3, 4) % 3).astype(np.float32)
    image = nib.Nifti1Image(labels, np.eye(4))
    image.set_data_dtype(np.uint8)
    nib.save(image, tmp_path / "label.nii")
    assert not np.array_equal(load_volume(tmp_path / "label.nii").array[0], labels)
    np.testing.assert_array_equal(load_labels(tmp_path / "label.nii", num_classes=3).array[0], labels)


def test_what_cannot_be_tested_is_said(recipe, data, tmp_path):
    with pytest.raises(SpecError, match="no finished run"):
        evaluate_run(tmp_path)
    rows = {f"case_{i}": (f"s{i}", i % 2, "train") for i in range(8)}
    write_splits(tmp_path / "splits.csv", rows)
    with pytest.raises(SpecError, match=r"splits\.csv: no case is for test"):
        cases_of(recipe.model_copy(update={"splits": str(tmp_path / "splits.csv")}), "test")
