"""The training loop: a stored loss curve, resuming bit for bit, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from medmim.errors import OutputError, SpecError, WeightsError
from medmim.spec import TrainingRecord
from medmim_training import engine
from medmim_training.checkpoint import CheckpointError, load_latest, save_checkpoint
from medmim_training.engine import NonFiniteLossError, build_method, pretrain
from medmim_training.preemption import Preempted
from medmim_training.recipe import Recipe
from medmim_training.record import MetricsLog, Report
from medmim_training.store.index import Store
from medmim_training.store.prepare import prepare
from medmim_training.store.sources import find_sources
from synthetic import write_scan

GOLDEN = Path(__file__).parent / "golden_loss.json"


def changed(recipe: Recipe, **sections) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(), **sections})


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Interrupted(Exception):
    """Stands for a kill: the loop gets no chance to save anything."""


def stop_at(step: int):
    def watch(report):
        if report.step == step:
            raise Interrupted

    return watch


def test_the_loss_curve_is_the_stored_one(finished):
    """20 steps; the file was written by this test's own run (`losses`), and changes only when training does."""
    expected = json.loads(GOLDEN.read_text())
    torch.testing.assert_close(torch.tensor(losses(finished[1])), torch.tensor(expected), rtol=2e-3, atol=0)


def test_the_loss_falls(finished):
    curve = losses(finished[1])
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])


@pytest.mark.parametrize("step", [3, 5, 13])
def test_a_killed_run_resumes_bit_for_bit(finished, recipe, store, tmp_path, step):
    with pytest.raises(Interrupted):
        pretrain(recipe, store, tmp_path, watch=stop_at(step))
    resumed = pretrain(recipe, store, tmp_path).state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in finished[0].state_dict().items())
    assert losses(tmp_path) == losses(finished[1])


def test_workers_do_not_change_the_result(finished, recipe, store, tmp_path):
    other = changed(recipe, data={**recipe.data.model_dump(), "workers": 2})
    trained = pretrain(other, store, tmp_path).state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in finished[0].state_dict().items())


def test_what_a_finished_run_leaves(finished, recipe, store):
    folder = finished[1]
    record = TrainingRecord.parse(json.loads((folder / "record.json").read_text()), source="record.json")
    assert (record.steps, record.crops, record.volumes) == (20, 80, 3)
    assert record.cpu_hours >= 0
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "best.pt",
        "step-00000015.pt",
        "step-00000020.pt",
    ]
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["step-00000010.png", "step-00000020.png"]
    written = (folder / "record.json").stat().st_mtime_ns
    assert pretrain(recipe, store, folder).encoder is not None  # nothing left to do, and nothing done again
    assert (folder / "record.json").stat().st_mtime_ns == written
    assert len(losses(folder)) == 20


def test_another_recipe_in_the_same_folder_is_refused(finished, recipe, store):
    with pytest.raises(SpecError, match="another recipe ran here"):
        pretrain(changed(recipe, seed=1), store, finished[1])


def test_a_damaged_checkpoint_is_named(recipe, store, tmp_path):
    with pytest.raises(Interrupted):
        pretrain(recipe, store, tmp_path, watch=stop_at(6))
    path = tmp_path / "checkpoints" / "step-00000005.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"step-00000005\.pt: damaged"):
        pretrain(recipe, store, tmp_path)


def test_a_loss_that_is_no_number_names_the_scans(recipe, store, tmp_path, monkeypatch):
    def broken(*args):
        method = build_method(*args)
        method.decoder.to_voxels.bias.data.fill_(float("nan"))
        return method

    monkeypatch.setattr(engine, "build_method", broken)
    with pytest.raises(NonFiniteLossError, match=r"step 1: the loss is nan; look at .*\.nii\.gz"):
        pretrain(recipe, store, tmp_path)


def test_a_gradient_that_is_no_number_is_refused_before_it_is_saved(recipe, store, tmp_path, monkeypatch):
    def broken(*args):
        method = build_method(*args)
        method.decoder.to_voxels.bias.register_hook(lambda gradient: gradient * float("inf"))
        return method

    monkeypatch.setattr(engine, "build_method", broken)
    every_step = changed(recipe, output={"checkpoint_every": 1})
    with pytest.raises(NonFiniteLossError, match=r"step 1: the gradient is (nan|inf); look at .*\.nii\.gz"):
        pretrain(every_step, store, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_the_best_is_kept_from_the_first_checkpoint_on_though_nothing_is_reported_yet(recipe, store, tmp_path):
    short = changed(recipe, schedule={"steps": 2}, output={"log_every": 20, "checkpoint_every": 1})
    pretrain(short, store, tmp_path)
    assert (tmp_path / "checkpoints" / "best.pt").is_file()


def test_the_best_is_kept_where_a_file_cannot_have_two_names(recipe, store, tmp_path, monkeypatch):
    """As on exFAT, network shares and mounted buckets."""

    def refused(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    pretrain(changed(recipe, schedule={"steps": 5}), store, tmp_path)
    best, last = (tmp_path / "checkpoints" / name for name in ("best.pt", "step-00000005.pt"))
    assert best.read_bytes() == last.read_bytes()


def test_pictures_know_the_sides_of_the_patient(recipe, store, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(engine, "reconstruction_picture", lambda *args, **settings: drawn.append(settings))
    volume = recipe.volume.model_copy(update={"orientation": "LPS"})
    turned = Store(store.folder)
    turned.volume = volume
    pretrain(changed(recipe, volume=volume, schedule={"steps": 10}), turned, tmp_path)
    assert [settings["orientation"] for settings in drawn] == ["LPS"]


def test_bf16_trains(recipe, store, tmp_path, finished):
    pretrain(changed(recipe, precision="bf16"), store, tmp_path)
    torch.testing.assert_close(torch.tensor(losses(tmp_path)), torch.tensor(losses(finished[1])), rtol=0.05, atol=0)


def test_fp16_needs_a_gpu(recipe, store, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match="fp16 needs a GPU"):
        pretrain(changed(recipe, precision="fp16"), store, tmp_path)


def test_the_scale_of_a_loss_survives_a_kill(recipe, store, tmp_path, monkeypatch):
    """What fp16 on a GPU adds to a run's state, here with the CPU's scaler, whose scale doubles every third step."""

    class Scaling(Accelerator):
        def __init__(self, **args):
            super().__init__(**args)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)

    monkeypatch.setattr(engine, "Accelerator", Scaling)
    whole = pretrain(recipe, store, tmp_path / "whole").state_dict()
    with pytest.raises(Interrupted):
        pretrain(recipe, store, tmp_path / "killed", watch=stop_at(12))
    resumed = pretrain(recipe, store, tmp_path / "killed").state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    scales = [load_latest(tmp_path / run / "checkpoints")["scaler"]["scale"] for run in ("whole", "killed")]
    assert scales == [4.0 * 2**6, 4.0 * 2**6]


def test_a_run_from_before_a_key_existed_goes_on(finished, recipe, store, tmp_path):
    """Its recipe lacks the key, which then has its default."""
    with pytest.raises(Interrupted):
        pretrain(recipe, store, tmp_path, watch=stop_at(6))
    path = tmp_path / "recipe.yaml"
    older = [line for line in path.read_text().splitlines() if "layer_decay" not in line and "kind: cosine" not in line]
    path.write_text("\n".join(older))
    resumed = pretrain(recipe, store, tmp_path).state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in finished[0].state_dict().items())


def test_weights_are_split_over_several_processes_only(recipe, store, tmp_path):
    with pytest.raises(SpecError, match="start several with torchrun"):
        pretrain(recipe, store, tmp_path, sharded=True)


def test_rates_warm_up_and_then_fall_as_a_cosine(finished):
    rates = [json.loads(line)["lr"] for line in (finished[1] / "metrics.jsonl").read_text().splitlines()]
    assert rates[:4] == pytest.approx([5e-4, 1e-3, 1.5e-3, rates[3]])
    assert rates[3] == max(rates)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 2e-5


def test_a_batch_computed_in_parts_is_the_whole_batch(recipe, store, tmp_path):
    plain = {**recipe.model.model_dump(), "args": {**recipe.model.args, "drop_path_rate": 0.0}}
    whole = pretrain(changed(recipe, model=plain), store, tmp_path / "whole").state_dict()
    parts = pretrain(changed(recipe, model=plain, accumulate=4), store, tmp_path / "parts").state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=2e-4)
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "parts")), torch.tensor(losses(tmp_path / "whole")), rtol=1e-4, atol=0
    )


def test_a_batch_that_does_not_divide_is_refused(recipe, store, tmp_path):
    with pytest.raises(SpecError, match="does not divide into 3 parts"):
        pretrain(changed(recipe, accumulate=3), store, tmp_path)


def test_the_average_follows_the_weights_and_survives_a_kill(recipe, store, tmp_path):
    averaged = changed(recipe, ema=0.8)
    whole = pretrain(averaged, store, tmp_path / "whole")
    last = torch.load(tmp_path / "whole/checkpoints/step-00000020.pt", weights_only=True)
    name = "encoder.blocks.0.mlp.fc1.weight"
    assert torch.equal(whole.state_dict()[name], last["average"][name])
    assert 0 < (last["average"][name] - last["method"][name]).abs().max() < 0.05
    with pytest.raises(Interrupted):
        pretrain(averaged, store, tmp_path / "killed", watch=stop_at(12))
    resumed = pretrain(averaged, store, tmp_path / "killed").state_dict()
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.state_dict().items())


def test_curves_for_tensorboard(recipe, store, tmp_path):
    output = {**recipe.output.model_dump(), "trackers": ["tensorboard"]}
    pretrain(changed(recipe, output=output, schedule={"steps": 2}), store, tmp_path)
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_the_rate_that_is_reported_is_that_of_the_last_layer(finished, recipe, store, tmp_path):
    optimizer = {**recipe.optimizer.model_dump(), "layer_decay": 0.5}
    with pytest.raises(Interrupted):
        pretrain(changed(recipe, optimizer=optimizer), store, tmp_path, watch=stop_at(2))
    plain, by_layer = (
        [json.loads(line)["lr"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (finished[1], tmp_path)
    )
    assert by_layer == plain[:2]


def test_an_optimizer_that_does_not_exist_is_named(recipe, store, tmp_path):
    optimizer = {**recipe.optimizer.model_dump(), "name": "adamx"}
    with pytest.raises(SpecError, match="adamx"):
        pretrain(changed(recipe, optimizer=optimizer), store, tmp_path)


def test_sigterm_saves_and_the_run_goes_on(finished, recipe, store, tmp_path):
    def terminate(report):
        if report.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="saved at step 8"):
        pretrain(recipe, store, tmp_path, watch=terminate)
    assert (tmp_path / "checkpoints" / "step-00000008.pt").is_file()
    resumed = pretrain(recipe, store, tmp_path).state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in finished[0].state_dict().items())


def test_the_best_is_kept_on_a_disk_where_a_file_has_one_name(tmp_path, monkeypatch):
    """As exFAT has it, and what some clouds mount."""

    def refuse(*paths):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step}, keep=1, best=step == 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step-00000002.pt"]
    assert torch.load(tmp_path / "best.pt", weights_only=True) == {"step": 1}


def test_a_full_disk_loses_nothing(finished, recipe, store, tmp_path, monkeypatch):
    """The second checkpoint fails as it does on a full disk: half of it is written, then the disk refuses."""
    save, calls = torch.save, []

    def fails_once(state, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half of a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(state, path)

    monkeypatch.setattr(torch, "save", fails_once)
    with pytest.raises(CheckpointError, match=r"step-00000010\.pt: could not be written .*No space left"):
        pretrain(recipe, store, tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best.pt", "step-00000005.pt"]
    resumed = pretrain(recipe, store, tmp_path).state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in finished[0].state_dict().items())


def test_a_log_that_cannot_grow_is_named(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl: cannot be written \(Is a directory\); make room"):
        log.write(Report(1, 2, 0.5, 1e-3, 1.0, 1.0, 0.0, 1.0, 1.0))


def test_samples_that_are_compared_are_computed_at_once(recipe, store, tmp_path):
    """In parts, SimCLR would know only the others of a part, and nothing at one sample a part."""
    simclr = {"name": "simclr", "args": {"hidden_dim": 16, "out_dim": 8}}
    with pytest.raises(SpecError, match=r"simclr compares all samples of a batch.*set accumulate to 1"):
        pretrain(changed(recipe, method=simclr, accumulate=2), store, tmp_path)
    with pytest.raises(SpecError, match="set batch_size to 2 or more"):
        pretrain(changed(recipe, method=simclr, batch_size=1), store, tmp_path / "one")


def test_a_run_keeps_to_its_store(recipe, store, tmp_path):
    short = changed(recipe, schedule={"steps": 1})
    pretrain(short, store, tmp_path)
    fewer = Store(store.folder)
    fewer.entries = fewer.entries[:2]
    with pytest.raises(
        SpecError, match=r"store\.json: the run drew from .*, of 3 volumes; .*, of 2, holds other scans"
    ):
        pretrain(short, fewer, tmp_path)
    (tmp_path / "store.json").unlink()  # as of an older medmim
    pretrain(short, store, tmp_path)
    assert (tmp_path / "store.json").is_file()


def test_a_copy_of_a_store_is_the_same_store(recipe, store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "elsewhere")
    assert Store(tmp_path / "elsewhere").digest() == store.digest()


def test_how_a_run_is_carried_out_may_change(finished, recipe, store, tmp_path):
    with pytest.raises(Interrupted):
        pretrain(recipe, store, tmp_path, watch=stop_at(6))
    output = {**recipe.output.model_dump(), "pictures_every": 7}
    other = changed(recipe, output=output, data={**recipe.data.model_dump(), "workers": 1})
    resumed = pretrain(other, store, tmp_path).state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in finished[0].state_dict().items())
    assert "pictures_every: 7" in (tmp_path / "recipe.yaml").read_text()


def test_what_differs_from_the_recipe_that_ran_is_named(finished, recipe, store):
    optimizer = {**recipe.optimizer.model_dump(), "lr": 0.5}
    with pytest.raises(SpecError, match=r"optimizer\.lr was 0\.002 and is now 0\.5; seed was 0 and is now 1"):
        pretrain(changed(recipe, optimizer=optimizer, seed=1), store, finished[1])


def test_a_tracker_that_is_not_installed_is_named_at_the_start(recipe, store, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    output = {**recipe.output.model_dump(), "trackers": ["wandb"]}
    with pytest.raises(SpecError, match="wandb is not installed; pip install wandb"):
        pretrain(changed(recipe, output=output), store, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_runs_of_several_precisions_in_one_process(recipe, store, tmp_path):
    for precision in ("fp32", "bf16", "fp32"):
        pretrain(changed(recipe, precision=precision, schedule={"steps": 1}), store, tmp_path / precision)
    curves = [losses(tmp_path / precision) for precision in ("fp32", "bf16")]
    assert curves[0] != curves[1]


def test_scans_of_other_channels_than_the_encoder_takes_are_refused(recipe, store, tmp_path):
    model = {**recipe.model.model_dump(), "args": {**recipe.model.args, "in_chans": 2}}
    with pytest.raises(SpecError, match=r"has 1 channels and the encoder takes 2"):
        pretrain(changed(recipe, model=model), store, tmp_path)


def test_the_average_is_where_the_weights_are(recipe, store, tmp_path, monkeypatch):
    """As on a GPU, here on torch's device without memory: timm copies the weights where they lie when it is made."""

    class Elsewhere(Accelerator):
        device = torch.device("meta")

    places = []

    def copied(method, decay):
        places.append({weight.device.type for weight in method.parameters()})
        raise Interrupted

    monkeypatch.setattr(engine, "Accelerator", Elsewhere)
    monkeypatch.setattr(engine, "ModelEmaV3", copied)
    with pytest.raises(Interrupted):
        pretrain(changed(recipe, ema=0.9), store, tmp_path)
    assert places == [{"meta"}]


@pytest.mark.parametrize("method", ["mae", "simclr"])
@pytest.mark.parametrize("shape", [(3, 5, 4), (40, 3, 3)], ids=["tiny", "thin"])
def test_scans_smaller_than_a_crop_train(recipe, tmp_path, method, shape):
    """Most hidden patches have no voxel of the scan inside of them, in some crops all."""
    (tmp_path / "scans").mkdir()
    write_scan(tmp_path / "scans/a.nii.gz", shape, seed=1)
    prepare(find_sources(tmp_path / "scans"), tmp_path / "store", volume=recipe.volume)
    data = {"foreground_share": 0.5, "workers": 0}
    args = {"mae": recipe.method.args, "simclr": {"hidden_dim": 16, "out_dim": 8}}[method]
    small = changed(recipe, method={"name": method, "args": args}, data=data, schedule={"steps": 3})
    pretrain(small, Store(tmp_path / "store"), tmp_path / "run")
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
