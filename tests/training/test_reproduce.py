"""Experiments: the packaged one asks for what it says, its runs go past faults, and its page says what was found."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import socket
import sys
import tarfile
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from urllib.error import URLError

import monai.apps.utils
import pytest
import torch
from scipy import stats

import medmim
from medmim.errors import SpecError
from medmim.spec import VolumeSpec
from medmim_training import cli
from medmim_training.fetch import FetchError, fetch_data
from medmim_training.plan import make_plan
from medmim_training.preemption import Preempted, stop_requests
from medmim_training.reproduce import estimate, page, runner
from medmim_training.reproduce.experiment import (
    Experiment,
    FineTuningRun,
    PretrainingRun,
    experiment_folder,
    load_experiment,
    needed_for,
    plan_runs,
)
from medmim_training.reproduce.results import paired_difference, speed, steps_to
from medmim_training.reproduce.runner import IncompleteError, Runner
from medmim_training.reproduce.shapes import write_shapes
from medmim_training.store.index import Store
from medmim_training.tasks import segmentation
from medmim_training.tasks.cases import find_cases, split_cases
from medmim_training.tasks.metrics import Score
from medmim_training.tasks.peers import PEERS, register_peers


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return load_experiment("paper-small")


@pytest.fixture(scope="module")
def runs(experiment):
    return plan_runs(experiment)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, cases=5, tests=1)
    return folder


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_every_row_has_its_seeds_and_shared_runs_are_run_once(experiment, runs):
    tuned = [run for run in runs if isinstance(run, FineTuningRun)]
    for name, table in experiment.tables.items():
        for row in table.rows:
            assert [run.seed for run in tuned if (name, row) in run.rows] == list(range(table.seeds))
    recipes = [run.recipe.to_yaml() for run in tuned if run.same_time_as is None]
    assert len(set(recipes)) == len(recipes)
    (shared,) = (run for run in tuned if ("labels", "10 %, continued") in run.rows and run.seed == 0)
    assert {table for table, _ in shared.rows} == {"methods", "labels", "ratio", "spacing"}


def test_what_a_run_starts_from_comes_before_it_and_has_its_grid(runs):
    before = set()
    for run in runs:
        before.add(run.id)
        start = getattr(run, "start", None)
        if start is not None:
            assert start.id in before
            for key in ("img_size", "patch_size"):
                assert run.recipe.model.args[key] == start.recipe.model.args[key]
            assert run.recipe.volume.spacing == start.recipe.volume.spacing
    assert {run.recipe.model.name for run in runs if run.recipe.model.name in PEERS} == set(PEERS)


def test_methods_differ_in_the_method_alone_and_get_the_same_arithmetic(runs):
    pretraining = {run.id.rsplit("-", 1)[0]: run.recipe for run in runs if isinstance(run, PretrainingRun)}
    methods = [pretraining[name] for name in ("mae", "simmim", "simclr")]
    same = [recipe.model_dump(exclude={"method", "model", "schedule"}) for recipe in methods]
    assert same[0] == same[1] == same[2]
    plans = [make_plan(recipe) for recipe in methods]
    arithmetic = [plan.flops_per_crop * plan.crops for plan in plans]
    assert arithmetic == pytest.approx([arithmetic[0]] * 3, rel=0.2)
    assert pretraining["simmim"].method.args["ratio"] == pretraining["mae"].method.args["ratio"]


def test_another_setting_is_another_run(experiment, runs):
    section = experiment.pretraining
    changed = {**section.variants, "mae": (*section.variants["mae"], "optimizer.lr=1e-3")}
    other = plan_runs(experiment.model_copy(update={"pretraining": section.model_copy(update={"variants": changed})}))
    moved = {run.id for run in runs} - {run.id for run in other}
    (mae,) = {run.start for run in runs if isinstance(run, FineTuningRun) and ("alone", "MAE") in run.rows}
    assert moved == {mae.id} | {run.id for run in runs if getattr(run, "start", None) is mae}


@pytest.mark.parametrize("path", sorted(experiment_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_experiments_can_be_planned(path):
    experiment = load_experiment(path.stem)
    assert experiment.name == path.stem
    wanted = {(name, row) for name, table in experiment.tables.items() for row in table.rows}
    assert {row for run in plan_runs(experiment) for row in getattr(run, "rows", ())} == wanted


def test_only_some_tables(runs):
    chosen = needed_for(runs, ["spacing"])
    assert {run.id for run in chosen if isinstance(run, PretrainingRun)} == {
        run.start.id for run in chosen if isinstance(run, FineTuningRun) and run.start
    }
    assert all(any(table == "spacing" for table, _ in run.rows) for run in chosen if isinstance(run, FineTuningRun))
    assert needed_for(runs, []) == runs


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"start": "s", "agains": "x"}, r"tables\.a\.rows\.x\.agains is no key of a recipe; did you mean 'against'"),
        ({"start": "s", "against": "y"}, "'x' is compared with 'y', which is no other row of its table"),
        ({}, r"tables\.a\.rows\.x\.start: Field required"),
        ({"start": "s", "same_time_as": "z"}, "'x' takes the time of 'z', which takes another one's"),
    ],
)
def test_mistakes_are_named(row, message, experiment, tmp_path):
    path = tmp_path / "e.yaml"
    table = {"title": "t", "paper": "p", "seeds": 1, "rows": {"x": row, "z": {"start": "s", "same_time_as": "x"}}}
    path.write_text(json.dumps({**experiment.model_dump(mode="json"), "tables": {"a": table}}))
    with pytest.raises(SpecError, match=message):
        load_experiment(str(path))
    with pytest.raises(SpecError, match="there is no experiment 'paper-smal'; nearest: paper-small"):
        load_experiment("paper-smal")
    path.write_text(json.dumps({**experiment.model_dump(mode="json"), "tables": {}}))
    with pytest.raises(SpecError, match="tables: Dictionary should have at least 1 item"):
        load_experiment(str(path))


def test_names_of_classes_are_text_whatever_is_in_them(experiment):
    names = ("background", "1", "no", "left, upper", "Größe: ganz")
    (run, *_) = (r for r in plan_runs(experiment.model_copy(update={"classes": names})) if isinstance(r, FineTuningRun))
    assert run.recipe.classes == names


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"start": "maee"}, "'maee' is neither scratch, mae-continued, .* nor a model with weights"),
        ({"start": "scratch", "overrides": ["fold=1"]}, "rows of an experiment must have one fold and one split file"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(row, message, experiment, shapes, tmp_path):
    first = next(iter(experiment.tables.values()))
    rows = {"scratch": first.rows["scratch"], "x": type(first.rows["scratch"]).model_validate(row)}
    changed = experiment.model_copy(update={"tables": {"methods": first.model_copy(update={"rows": rows})}})
    with pytest.raises(SpecError, match=message):
        Runner(changed, shapes, tmp_path)


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch):
    """Runs that take no time and leave what a run leaves; gives the ids in the order in which they ran."""
    ran = []

    def pretrain(recipe, store, folder, watch):
        ran.append(folder.name)
        return torch.nn.Linear(1, 1)

    def save(model, folder):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    def finetune(recipe, folder, watch):
        ran.append(folder.name)
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        (folder / "split.json").write_text('{"training": ["a"]}')
        (folder / "validation.jsonl").write_text('{"step": 1, "dice": 0.1}\n{"step": 2, "dice": 0.4}\n')

    torch.nn.Linear.encoder = None
    monkeypatch.setattr(runner, "pretrain", pretrain)
    monkeypatch.setattr(runner, "save_pretrained", save)
    monkeypatch.setattr(runner, "finetune", finetune)
    monkeypatch.setattr(runner, "seconds_a_step", lambda recipe: 1.0 if recipe.model.name in PEERS else 3.0)
    monkeypatch.setattr(
        runner, "evaluate_run", lambda folder, side: [Score("a", "one", 0.5, 2.0), Score("b", "one", 0.7, 1.0)]
    )
    yield ran
    del torch.nn.Linear.encoder


def status(folder) -> dict[str, str]:
    return {
        entry["run"]: entry["status"] for entry in json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    }


def test_what_fails_is_said_at_the_end_and_tried_again(pretend, experiment, shapes, tmp_path, monkeypatch):
    grid = Runner(experiment, shapes, tmp_path, smoke=True, only=["decoder"])
    works = runner.pretrain

    def broken(recipe, store, folder, watch):
        if folder.name.startswith("mae-depth8"):
            raise RuntimeError("no\nluck")
        return works(recipe, store, folder, watch)

    monkeypatch.setattr(runner, "pretrain", broken)
    with pytest.raises(IncompleteError, match=r"2 of 10 runs failed, such as mae-depth8-\w+ \(RuntimeError: no luck\)"):
        grid.run()
    found = status(tmp_path)
    failed = [run for run, word in found.items() if word == "failed"]
    assert len(failed) == 2
    assert all(run.startswith("mae-depth8") for run in failed)
    assert sum(word == "done" for word in found.values()) == len(pretend) == 8

    monkeypatch.setattr(runner, "pretrain", works)
    Runner(experiment, shapes, tmp_path, smoke=True, only=["decoder"]).run()
    assert len(pretend) == len(set(pretend)) == 10
    text = page.write_report(grid, tmp_path / "report").read_text(encoding="utf-8")
    assert f"Incomplete: {sum(isinstance(r, FineTuningRun) for r in grid.wanted)} of" in text
    assert "## How deep the decoder of pretraining is" in text


def test_pretraining_is_done_for_what_starts_from_it_alone(pretend, experiment, shapes, tmp_path):
    """Results may be kept, and gone on with, without the weights that they started from."""
    Runner(experiment, shapes, tmp_path, smoke=True, only=["decoder"]).run()
    shutil.rmtree(tmp_path / "pretraining")
    before = len(pretend)
    again = Runner(experiment, shapes, tmp_path, smoke=True, only=["decoder"])
    again.run()
    assert len(pretend) == before
    tuned = next(run for run in again.wanted if isinstance(run, FineTuningRun))
    shutil.rmtree(tmp_path / "finetuning" / tuned.id)
    again.run()
    assert pretend[before:] == [tuned.start.id, tuned.id]


def test_pretraining_that_nothing_waits_for_is_neither_counted_nor_taken_for_another_ones(
    pretend, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(estimate, "flops", lambda run, split: 3.6e12)  # an hour, with what --tflops says below
    command = ["medmim-train", "reproduce", "paper-small", "-o", str(tmp_path), "--smoke", "--only", "decoder"]

    def call(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capfd.readouterr().out

    call()
    shutil.rmtree(tmp_path / "pretraining")
    assert "other processes" not in call()
    planned = call("--dry-run", "--tflops", "0.001")
    assert planned.count("not needed") == 5
    assert "left, at the least: 0.0 hours" in planned


def test_sigterm_between_steps_and_between_runs(pretend, experiment, shapes, tmp_path, monkeypatch):
    grid = Runner(experiment, shapes, tmp_path, smoke=True, only=["ratio"])
    works = runner.finetune

    def told_to_stop(recipe, folder, watch):
        works(recipe, folder, watch)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner, "finetune", told_to_stop)
    with pytest.raises(Preempted, match=r"stopped after run 2 of 16"):
        grid.run()
    assert list(status(tmp_path).values()).count("done") == 2

    def preempted(recipe, folder, watch):
        raise Preempted("saved")

    monkeypatch.setattr(runner, "finetune", preempted)
    with pytest.raises(Preempted, match="saved"):
        grid.run()
    assert "failed" not in status(tmp_path).values()


def test_ctrl_c_and_a_kill_leave_no_run_that_says_it_is_running(pretend, experiment, shapes, tmp_path, monkeypatch):
    grid, seen = Runner(experiment, shapes, tmp_path, smoke=True, only=["ratio"]), []

    def interrupted(recipe, folder, watch):
        seen.append(status(tmp_path)[folder.name])
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "finetune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grid.run()
    assert seen == ["running"]
    words = list(status(tmp_path).values())
    assert (words.count("done"), words.count("stopped"), words.count("running")) == (1, 1, 0)

    text = (tmp_path / "manifest.json").read_text().replace('"stopped"', '"running"')  # as a kill leaves it
    (tmp_path / "manifest.json").write_text(text)
    grid.write_manifest()
    assert list(status(tmp_path).values()) == words


def test_a_run_of_another_process_is_left_to_it(pretend, experiment, shapes, tmp_path, monkeypatch):
    """Another process, which two objects with locks of their own are as good as, has the first run and then ends it."""
    ours, theirs = (Runner(experiment, shapes, tmp_path, smoke=True, only=["peers"]) for _ in range(2))
    reference = next(run for run in ours.wanted if isinstance(run, FineTuningRun))
    waiting = [run.id for run in ours.wanted if isinstance(run, FineTuningRun) and run.same_time_as is reference]
    (other,) = (run for run in theirs.wanted if run.id == reference.id)

    class Event(threading.Event):
        def wait(self, timeout=None):  # between two looks: nothing that needs the run of the other process was begun
            assert pretend
            assert not {reference.id, *waiting} & set(pretend)
            assert status(tmp_path)[reference.id] == "running"
            theirs._one(other, lambda step: None)
            return False

    monkeypatch.setattr(runner, "stop_requests", lambda: nullcontext(Event()))
    with theirs.claims.of(reference.id) as is_theirs:
        assert is_theirs
        ours.run()
    assert waiting
    assert pretend[-len(waiting) - 1 :] == [reference.id, *waiting]


def test_with_all_else_in_other_hands_a_process_ends(pretend, experiment, shapes, tmp_path):
    ours, theirs = (Runner(experiment, shapes, tmp_path, smoke=True, only=["ratio"]) for _ in range(2))
    last = ours.wanted[-1]
    with theirs.claims.of(last.id):
        ours.run()
    assert last.id not in pretend
    assert len(pretend) == len(ours.wanted) - 1
    ours.run()
    assert pretend[-1] == last.id


def test_what_takes_the_time_of_a_failed_run_fails_too(pretend, experiment, shapes, tmp_path, monkeypatch):
    works = runner.finetune

    def broken(recipe, folder, watch):
        if recipe.model.name not in PEERS:
            raise RuntimeError("no luck")
        works(recipe, folder, watch)

    monkeypatch.setattr(runner, "finetune", broken)
    grid = Runner(experiment, shapes, tmp_path, smoke=True, only=["peers"])
    with pytest.raises(IncompleteError):
        grid.run()
    reference = next(run for run in grid.wanted if isinstance(run, FineTuningRun) and run.same_time_as is None)
    for run in grid.wanted:
        if getattr(run, "same_time_as", None) is reference:
            assert grid.problems[run.id] == f"it needs {reference.id}, which failed"


def test_runs_of_other_cases_are_not_gone_on_with(pretend, experiment, shapes, tmp_path):
    data = shutil.copytree(shapes, tmp_path / "data")
    Runner(experiment, data, tmp_path / "out", smoke=True, only=["peers"]).run()
    text = (data / "subjects.csv").read_text()
    header, first, *others = text.splitlines()
    (data / "subjects.csv").write_text("\n".join([header, first.rpartition(",")[0] + ",test", *others]) + "\n")
    changed = Runner(experiment, data, tmp_path / "out", smoke=True, only=["peers"])
    with pytest.raises(SpecError, match=r"split\.json: the run began with other cases for"):
        changed.run()
    with pytest.raises(SpecError, match=r"split\.json: the run began with other cases for"):
        page.write_report(changed, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_signal_is_heard_by_all_that_wait_for_one():
    with stop_requests() as outer:
        with stop_requests() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner.is_set()
        assert outer.is_set()
    with stop_requests() as later:
        assert not later.is_set()


def test_peers_get_the_time_of_the_other_and_keep_it(pretend, experiment, shapes, tmp_path, monkeypatch):
    grid = Runner(experiment, shapes, tmp_path, only=["peers"])
    grid.run()
    runs = {run.recipe.model.name: run for run in grid.wanted if isinstance(run, FineTuningRun)}
    for name in PEERS:
        text = (grid.place(runs[name]) / "recipe.yaml").read_text(encoding="utf-8")
        assert "steps: 1800" in text  # three times 600
        assert "checkpoint_every: 180" in text
    monkeypatch.setattr(runner, "seconds_a_step", None)
    assert "schedule.steps=1800" in grid.command(runs["monai_unet"])


def test_a_step_is_timed_after_the_warm_up_of_the_head(runs, monkeypatch):
    """In it the encoder is not trained, and a step of most of the run takes longer."""
    (recipe, *_) = (run.recipe for run in runs if isinstance(run, FineTuningRun))
    timed = []

    def finetune(recipe, folder, watch):
        timed.append(recipe)
        for step in range(1, 20):
            watch(SimpleNamespace(cpu_seconds=3.0 * step, wall_seconds=3.0 * step))

    monkeypatch.setattr(runner, "finetune", finetune)
    assert runner.seconds_a_step(recipe.model_copy(update={"head_warmup": 50})) == 3
    assert [each.head_warmup for each in timed] == [0]


def store_of(experiment, data, folder, **rules) -> Store:
    """What an experiment pretrains on, of one of its recipes with other rules of intensity."""
    grid = Runner(experiment, data, folder, smoke=True)
    (recipe, *_) = (run.recipe for run in grid.runs if isinstance(run, PretrainingRun))
    volume = VolumeSpec.parse({"intensity": rules}, source="x")
    return grid._store(recipe.model_copy(update={"volume": volume}))


def test_pretraining_takes_scans_for_the_modality_that_is_named(experiment, shapes, tmp_path):
    named = experiment.model_copy(update={"modality": "CT"})  # the shapes have no air, so they look like MR
    window = {"kind": "window", "low": -1000, "high": 1000}
    store = store_of(named, shapes, tmp_path, CT=window, MR={"kind": "zscore"})
    assert {entry.modality for entry in store.entries} == {"CT"}


def test_each_preprocessing_has_its_store(experiment, shapes, tmp_path):
    stores = [store_of(experiment, shapes, tmp_path, MR={"kind": kind}) for kind in ("zscore", "percentile")]
    assert stores[0].folder != stores[1].folder


def test_data_without_a_test_is_refused(experiment, tmp_path):
    write_shapes(tmp_path, cases=4, tests=0)
    with pytest.raises(SpecError, match="no case is for the test"):
        Runner(experiment, tmp_path, tmp_path / "out")
    with pytest.raises(SpecError, match="no table 'speed'; it has methods, alone"):
        Runner(experiment, tmp_path, tmp_path / "out", only=["speed"])


@pytest.mark.slow
def test_all_of_it_in_a_tiny_form(tmp_path, monkeypatch, capfd, registry):
    monkeypatch.setattr(segmentation, "segmentation_picture", lambda *arguments, **settings: None)  # half of the time
    monkeypatch.setattr(runner, "TIMED_STEPS", 1)
    monkeypatch.setattr(runner, "UNTIMED_STEPS", 1)

    def call(*arguments) -> str:
        monkeypatch.setattr(
            sys, "argv", ["medmim-train", "reproduce", "paper-small", "-o", str(tmp_path), "--smoke", *arguments]
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capfd.readouterr().out

    call()
    entries = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert {entry["status"] for entry in entries} == {"done"}
    experiment = load_experiment("paper-small").tiny()
    with open(tmp_path / "report" / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(entry["kind"] == "finetuning" for entry in entries)
    for row in rows:
        assert 0 <= float(row["test_dice"]) <= 1
        assert float(row["cpu_seconds"]) > 0
    text = (tmp_path / "report" / "README.md").read_text(encoding="utf-8")
    assert "Incomplete" not in text
    assert "figures mean nothing" in text
    for name, table in experiment.tables.items():
        assert table.title in text
        assert (tmp_path / "report" / f"{name}.png").is_file()
        for row in table.rows:
            assert f"| {row} | {table.seeds} |" in text

    # Neither test nor validation cases are in any store.
    split = split_cases(find_cases(tmp_path / "shapes"), 0, source="x")
    for store in (tmp_path / "stores").iterdir():
        assert {entry.source for entry in Store(store).entries} == {case.image.name for case in split.training}

    # Again: nothing is run, and the page is the same.
    for name in ("pretrain", "finetune", "evaluate_run"):
        monkeypatch.setattr(runner, name, None)
    call()
    assert (tmp_path / "report" / "README.md").read_text(encoding="utf-8") == text
    assert "16.0" not in call("--dry-run", "--only", "spacing", "--tflops", "1")

    # Without the record of a pretraining its cost is not known.
    for record in (tmp_path / "pretraining").glob("mae-continued-*/metrics.jsonl"):
        record.unlink()
    call("--report")
    text = (tmp_path / "report" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if "continued on the task's scans" in line)
    assert row.split(" | ")[-3:-1] == ["-", "-"]


# --- statistics -------------------------------------------------------------------------------------------------------


def test_the_paired_interval_is_that_of_the_t_test():
    ours, theirs = {0: 0.81, 1: 0.84, 2: 0.80, 3: 0.86, 7: 0.5}, {0: 0.80, 1: 0.80, 2: 0.79, 3: 0.83, 9: 0.1}
    found = paired_difference(ours, theirs)
    pairs = [[each[seed] for seed in range(4)] for each in (ours, theirs)]
    interval = stats.ttest_rel(*pairs).confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.is_told == (stats.ttest_rel(*pairs).pvalue < 0.05)
    single = paired_difference({0: 0.5}, {0: 0.25})
    assert (single.mean, single.is_told, math.isnan(single.low)) == (0.25, False, True)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_what_a_run_does_not_have_is_left_out_of_the_page():
    without, with_one = ({seed: SimpleNamespace(test_dice=dice) for seed in range(2)} for dice in (math.nan, 0.5))
    assert page._difference(with_one, without) is None
    assert page._difference(with_one, with_one).mean == 0
    assert page._spread([1.0, 2.0], 2) == "1.50 ± 0.71"
    assert page._spread([1.0], 2) == "1.00"
    assert page._spread([math.nan, 1.0], 2) == "-"


def test_results_of_cubic_patches_and_how_steps_were_counted(pretend, experiment, shapes, tmp_path):
    first = experiment.tables["alone"]
    cubes = first.rows["scratch"].model_copy(update={"overrides": ("model.args.patch_size=8",)})
    table = first.model_copy(update={"rows": {"scratch": cubes}, "seeds": 1})
    grid = Runner(experiment.model_copy(update={"tables": {"alone": table}}), shapes, tmp_path)
    grid.run()
    text = page.write_report(grid, tmp_path / "report").read_text(encoding="utf-8")
    with open(tmp_path / "report" / "results.csv", newline="", encoding="utf-8") as file:
        assert [row["patch"] for row in csv.DictReader(file)] == ["8x8x8"]
    assert "the median over seeds" in text


def test_steps_to_a_dice():
    curve = ((10, 0.2), (20, 0.6), (30, 0.5), (40, 0.7))
    assert steps_to(curve, 0.1) == 10
    assert steps_to(curve, 0.4) == pytest.approx(15)
    assert steps_to(curve, 0.65) == pytest.approx(37.5)
    assert steps_to(curve, 0.71) == math.inf
    slow, fast, never = ((10, 0.1), (20, 0.5)), ((10, 0.5), (20, 0.6)), ((10, 0.1), (20, 0.2))
    found = speed({0: fast, 1: fast, 2: never}, {0: slow, 1: slow, 2: slow})
    assert (found.ratio, found.reached, found.number) == (2.0, 2, 3)
    assert speed({0: never}, {0: slow}).ratio == 0


# --- peers and data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_saved_and_loaded(name, registry, tmp_path):
    register_peers()
    register_peers()
    model = medmim.create_segmenter(name, "light", num_classes=3, img_size=(8, 16, 12), channels=(4, 8, 8)).eval()
    x = torch.randn(2, 1, 8, 16, 12)
    assert model(x).shape == (2, 3, 8, 16, 12)
    medmim.save_pretrained(model, tmp_path)
    assert torch.equal(medmim.from_pretrained(tmp_path)(x), model(x))
    model(x).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_shapes_are_labelled_exactly(shapes):
    cases = find_cases(shapes)
    split = split_cases(cases, 0, source="x")
    assert [len(side) for side in (split.training, split.validation, split.test)] == [2, 2, 1]
    scan, labels = (medmim.load_volume(path).array[0] for path in (cases[0].image, cases[0].label))
    means = [scan[labels == label].mean() for label in range(3)]
    assert means[0] + 30 < means[1] < means[2] - 30


@pytest.mark.parametrize("what", ["another checksum", "no network", "an archive without what is listed"])
def test_a_download_that_fails_is_one_sentence_and_leaves_nothing(what, tmp_path, monkeypatch, capfd):
    """With MONAI's own code around what would go over the network."""
    patience = []

    def retrieve(url, path, reporthook=None):
        patience.append(socket.getdefaulttimeout())
        if what == "no network":
            raise URLError("Name or service not known")
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo("Task04_Hippocampus/dataset.json"))

    monkeypatch.setattr(monai.apps.utils, "urlretrieve", retrieve)
    if what == "an archive without what is listed":
        monkeypatch.setattr(monai.apps.utils, "check_hash", lambda *arguments: True)
    monkeypatch.setattr(sys, "argv", ["medmim-train", "fetch-data", "hippocampus", "-o", str(tmp_path / "data")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    last = capfd.readouterr().err.splitlines()[-1]
    reason = {"another checksum": "hash check", "no network": "not known"}.get(what, "lacks 208 listed cases")
    assert last.startswith("medmim-train: error: https://")
    assert reason in last
    assert list((tmp_path / "data").iterdir()) == []
    assert patience == [60]
    assert socket.getdefaulttimeout() is None


def test_fetched_data_have_the_split(tmp_path):
    with open(experiment_folder() / "hippocampus.csv", newline="", encoding="utf-8") as file:
        listed = [row["case"] for row in csv.DictReader(file)]
    names = [*listed, "hippocampus_900"]

    def download(url, filepath, output_dir, *, hash_val, hash_type):
        assert hash_type == "md5"
        assert len(hash_val) == 32
        for kind in ("imagesTr", "labelsTr"):
            (folder := filepath.parent / "Task04_Hippocampus" / kind).mkdir(parents=True)
            for name in names:
                (folder / f"{name}.nii.gz").touch()
            (folder / "._hippocampus_001.nii.gz").touch()
        (filepath.parent / "Task04_Hippocampus" / "dataset.json").write_text("{}")

    assert fetch_data("hippocampus", tmp_path / "data", download=download) == (len(listed), 1)
    cases = find_cases(tmp_path / "data")
    assert [case.name for case in cases] == listed
    split = split_cases(cases, 0, source="x")
    assert [len(side) for side in (split.training, split.validation, split.test)] == [107, 51, 50]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "dataset.json", "imagesTr", "labelsTr", "subjects.csv",
    ]  # fmt: skip

    with pytest.raises(SpecError, match="imagesTr already"):
        fetch_data("hippocampus", tmp_path / "data", download=download)
    names.remove(listed[0])
    with pytest.raises(FetchError, match=f"lacks 1 listed cases, such as {listed[0]}"):
        fetch_data("hippocampus", tmp_path / "less", download=download)
    assert list((tmp_path / "less").iterdir()) == []

    def fail(*arguments, **settings):
        raise RuntimeError("md5 check failed")

    with pytest.raises(FetchError, match="md5 check failed"):
        fetch_data("hippocampus", tmp_path / "broken", download=fail)
    with pytest.raises(SpecError, match="no data set 'liver'"):
        fetch_data("liver", tmp_path / "liver")
