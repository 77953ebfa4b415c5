"""Whole processes: killed at bad moments, and several at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fakes import TINY
from medmim_training.checkpoint import load_latest
from medmim_training.engine import METRICS_FILE, pretrain
from medmim_training.recipe import Recipe
from medmim_training.store.index import INDEX_FILE, Store

TRAIN = "from medmim_training.cli import main; main()"
STOPPED_IN_STEP_3 = """
import os, signal
from medmim_training.engine import _Run

forward, calls = _Run._forward, []

def terminated(self, batch):
    calls.append(batch)
    if len(calls) == 3 and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return forward(self, batch)

_Run._forward = terminated
"""

AN_HOUR_EACH = """
from medmim_training.record import Clock

Clock.read = lambda self: {"wall": 3600.0, "cpu": 3600.0}
"""


def command(recipe: Recipe, store, folder: Path, *options: str, processes: int = 1) -> list[str]:
    path = folder.with_suffix(".yaml")
    path.write_text(recipe.to_yaml())
    arguments = ["pretrain", str(path), "--data", str(store.folder), "-o", str(folder), "--threads", "1", *options]
    if processes == 1:
        return [sys.executable, "-c", TRAIN, *arguments]
    script = folder.with_suffix(".py")
    script.write_text(TRAIN)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, str(script), *arguments]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / METRICS_FILE).read_text().splitlines()]


def environment() -> dict[str, str]:
    # Children import what this process imports, installed or not.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


def started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_latest(folder / "checkpoints")["method"]


@pytest.mark.parametrize("moment", ["in a step", "in a checkpoint"])
def test_a_process_killed_outright_resumes_bit_for_bit(finished, recipe, store, tmp_path, moment):
    folder = tmp_path / "run"
    process = started(command(recipe, store, folder))
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if moment == "in a step" and len(list(folder.glob("checkpoints/step-*.pt"))) == 2:
            break
        if moment == "in a checkpoint" and list(folder.glob("checkpoints/.writing-*")):
            break
        time.sleep(0.0005)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    resumed = pretrain(recipe, store, folder).state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in finished[0].state_dict().items())


@pytest.mark.parametrize("method", ["mae", "simclr"])
def test_two_processes_train_as_one(recipe, store, tmp_path, method):
    """DDP over gloo on halves of each batch, against one process on whole ones; SimCLR compares across them."""
    plain = {**recipe.model.model_dump(), "args": {**recipe.model.args, "drop_path_rate": 0.0}}
    args = {"mae": recipe.method.args, "simclr": {"hidden_dim": 16, "out_dim": 8}}[method]
    settings = {"model": plain, "method": {"name": method, "args": args}, "schedule": {"steps": 8, "warmup": 2}}
    recipe = Recipe.model_validate({**recipe.model_dump(), **settings})
    one = pretrain(recipe, store, tmp_path / "one").state_dict()
    two = tmp_path / "two"
    launch = command(recipe, store, two, processes=2)
    two.with_suffix(".py").write_text(AN_HOUR_EACH + TRAIN)
    subprocess.run(launch, env=environment(), check=True, capture_output=True)
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, one[name], rtol=0, atol=2e-4)
    torch.testing.assert_close(*(torch.tensor(losses(tmp_path / run)) for run in ("one", "two")), rtol=1e-4, atol=0)
    record = json.loads((two / "record.json").read_text())
    assert (record["wall_hours"], record["cpu_hours"]) == (1.0, 2.0)
    assert record["hardware"].startswith("2 x 1 of ")


@pytest.mark.slow
def test_weights_split_over_processes_train_as_whole_ones(recipe, store, tmp_path):
    """FSDP2 over gloo against one process; then each goes on where the other stopped."""
    plain = {**recipe.model.model_dump(), "args": {**recipe.model.args, "drop_path_rate": 0.0}}
    settings = {"model": plain, "ema": 0.8, "accumulate": 2, "schedule": {"steps": 8, "warmup": 2}}
    recipe = Recipe.model_validate({**recipe.model_dump(), **settings})
    one, split = tmp_path / "one", tmp_path / "split"
    launch = command(recipe, store, split, "--shard", processes=2)
    expected = pretrain(recipe, store, one).state_dict()
    subprocess.run(launch, env=environment(), check=True, capture_output=True)
    last = load_latest(split / "checkpoints")
    assert last["average"].keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(last["average"][name], tensor, rtol=0, atol=2e-4)

    for run, other in ((one, split), (split, one)):
        (run / "checkpoints/step-00000008.pt").unlink()
        (run / "checkpoints/step-00000005.pt").write_bytes((other / "checkpoints/step-00000005.pt").read_bytes())
        (run / "record.json").unlink()
    subprocess.run(launch, env=environment(), check=True, capture_output=True)
    pretrain(recipe, store, one)
    for run in (one, split):
        state = load_latest(run / "checkpoints")
        assert state["step"] == 8
        for name, tensor in expected.items():
            torch.testing.assert_close(state["average"][name], tensor, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_weights_of_residual_encoders_can_be_split(recipe, store, tmp_path):
    settings = {
        "model": {**recipe.model.model_dump(), "name": "resenc_b_mae3d", "args": TINY["resenc"]},
        "method": {"name": "mae_cnn", "args": {"unit": [16, 16, 8]}},
        "schedule": {"steps": 3, "warmup": 1},
    }
    recipe = Recipe.model_validate({**recipe.model_dump(), **settings})
    launch = command(recipe, store, tmp_path / "split", "--shard", processes=2)
    pretrain(recipe, store, tmp_path / "one")
    subprocess.run(launch, env=environment(), check=True, capture_output=True)
    # Of the loss: biases that a norm undoes have gradients of rounding alone, whose sign Adam follows.
    torch.testing.assert_close(*(torch.tensor(losses(tmp_path / run)) for run in ("one", "split")), rtol=1e-4, atol=0)


def test_all_processes_stop_after_the_same_step(recipe, store, tmp_path):
    """The second of two is told to stop; the first saves, since it alone writes."""
    folder = tmp_path / "run"
    launch = command(recipe, store, folder, processes=2)
    folder.with_suffix(".py").write_text(STOPPED_IN_STEP_3 + TRAIN)
    errors = subprocess.run(launch, env=environment(), capture_output=True, text=True, encoding="utf-8").stderr
    assert "stopped and saved at step 3" in errors
    assert load_latest(folder / "checkpoints")["step"] == 3


def test_a_preempted_command_has_its_own_exit_code(recipe, store, tmp_path):
    folder = tmp_path / "run"
    process = started(command(recipe, store, folder))
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):  # the first step is done
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "stopped and saved at step" in errors
    assert load_latest(folder / "checkpoints")["step"] >= 1


def with_a_reader(recipe: Recipe) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(), "data": {**recipe.data.model_dump(), "workers": 1}})


def group_of_its_own(command: list[str], log: Path) -> subprocess.Popen[str]:
    """A command as a shell or a scheduler starts it, when there are three lines in what it writes."""
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the tests may have been started to ignore
    try:
        process = subprocess.Popen(
            command, env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )
    finally:
        signal.signal(signal.SIGINT, ours)
    while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    return process


def alive(group: int) -> list[str]:
    """What runs in a process group; the dead of whom nobody has asked do not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append((stat.parent / "cmdline").read_text())
    return found


def left_alive(group: int) -> list[str]:
    """What of a process group does not end by itself."""
    deadline = time.monotonic() + 30
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive(group)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_the_whole_group_saves_the_run(recipe, store, tmp_path, number):
    """As Slurm, torchrun and a terminal send it: the process that reads crops gets it, too."""
    folder, recipe = tmp_path / "run", with_a_reader(recipe)
    process = group_of_its_own(command(recipe, store, folder, "schedule.steps=100000"), folder / METRICS_FILE)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "stopped and saved at step" in errors
    assert "Traceback" not in errors
    assert load_latest(folder / "checkpoints")["step"] >= 3
    assert alive(process.pid) == []


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks at /proc")
def test_readers_end_with_a_run_that_is_killed(recipe, store, tmp_path):
    folder = tmp_path / "run"
    training = command(with_a_reader(recipe), store, folder, "schedule.steps=100000")
    process = group_of_its_own(training, folder / METRICS_FILE)
    assert len(alive(process.pid)) >= 2
    process.kill()
    process.communicate()
    assert left_alive(process.pid) == []


@pytest.mark.parametrize(("before", "after"), [("SIG_IGN", 0), ("SIG_DFL", -signal.SIGINT)])
def test_what_is_started_to_ignore_an_interrupt_ignores_it(before, after):
    """As a shell starts what runs in the background of a script."""
    code = (
        f"import os, signal; signal.signal(signal.SIGINT, signal.{before})\n"
        "from medmim_training.preemption import be_reachable\n"
        "be_reachable(); os.kill(os.getpid(), signal.SIGINT)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == after


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks at /proc")
def test_a_preparation_ends_at_once_when_it_is_interrupted(recipe, scans, tmp_path):
    """Ctrl-C, as impatient people press it; what is in the store then is whole."""
    (tmp_path / "scans").mkdir()
    for number in range(400):
        shutil.copy(scans / "large.nii.gz", tmp_path / "scans" / f"{number}.nii.gz")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    folders = [str(tmp_path / name) for name in ("scans", "store", "recipe.yaml")]
    arguments = ["prepare", folders[0], "-o", folders[1], "--recipe", folders[2], "--workers", "2"]
    process = group_of_its_own([sys.executable, "-c", TRAIN, *arguments], tmp_path / "store" / INDEX_FILE)
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert left_alive(process.pid) == []
    store = Store(tmp_path / "store")
    assert 3 <= len(store.entries) < 400
    store.array(0)
