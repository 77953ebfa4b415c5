"""The way of weights from a run, through a hub or a folder, to a stranger's process: bit for bit."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import medmim
from hubdouble import HubDouble
from medmim import cli as hub_cli
from medmim_training import cli as training_cli
from mirrors import OLAH, olah_before

REPO = "org/vit_t"
FILES = [
    *("README.md", "config.json", "data.csv", "decoder.safetensors", "golden.safetensors", "model.safetensors"),
    "recipe.yaml",
    "reconstruction.png",
]

# What a stranger does. Golden outputs must be equal, not only close: it is the same machine, with one thread.
STRANGER = """
import os
import sys
import torch
from safetensors.torch import load_file, save_file
import medmim
from medmim.golden import golden_outputs
from medmim.mirror import mirror

def load(name, output):
    model = medmim.create_model(name, pretrained=True)
    golden = load_file(model.weights_place.fetch(model.spec.weights.golden))
    outputs = golden_outputs(model, medmim.create_decoder(model))
    assert outputs.keys() == golden.keys() == {"pooled", "tokens", "hidden_patches"}
    assert all(torch.equal(outputs[key], golden[key]) for key in golden)
    save_file(model.state_dict(), f"{output}.safetensors")

name, hub = sys.argv[1:]
"""
ONLINE = """
load(name, "online")
mirror(name, hub)
"""
MIRRORED = """
load(name, "mirrored")
"""
OFFLINE = """
load(name, "offline")
os.environ["MEDMIM_HUB"] = hub
load(name, "local")
"""


def call(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["medmim", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code


@pytest.fixture
def run_publish(finished, store, tmp_path, monkeypatch, capsys):
    """Publishes the finished run on the command line; gives what was printed."""
    (tmp_path / "us.bib").write_text("@misc{us, title={Ours}}")

    def publish(*options):
        described = (
            "--data",
            store.folder,
            "--tag",
            "ours",
            "--license",
            "CC-BY-4.0",
            "--citation",
            tmp_path / "us.bib",
        )
        monkeypatch.setenv("COLUMNS", "200")
        call(monkeypatch, training_cli.main, "publish", finished[1], REPO, *described, *options)
        return capsys.readouterr().out

    return publish


def stranger(does, name, hub, folder, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in environment.items()}}
    arguments = [sys.executable, "-c", STRANGER + does, name, str(hub)]
    subprocess.run(arguments, check=True, env=environment, cwd=folder)


def assert_trained(method, path):
    """Whether a file has the weights of the trained encoder, in the precision in which they are published."""
    trained, loaded = method.encoder.state_dict(), load_file(path)
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[key], trained[key].bfloat16().float()) for key in trained)


def commit_in(out):
    return re.search(rf'create_model\("hf-hub:{REPO}@([0-9a-f]{{40}})", pretrained=True\)', out)[1]


@pytest.mark.slow
def test_from_a_run_to_a_stranger(finished, run_publish, transport, store, tmp_path, monkeypatch):
    with HubDouble() as double:
        commit = commit_in(run_publish("--endpoint", double.endpoint, "--token", "hf_write"))
        repository = double.repos[REPO]
        assert [found.title for found in repository.history(repository.find("main"))][1:] == ["initial commit"]
        assert repository.branches["main"] == commit
        assert sorted(repository.files) == FILES
        rows = list(csv.DictReader(repository.files["data.csv"].content.decode().splitlines()))
        assert [row["sha256"] for row in rows] == [entry.sha256 for entry in store.entries]
        assert f'create_model("hf-hub:{REPO}", pretrained=True)' in repository.files["README.md"].content.decode()

        there = (f"hf-hub:{REPO}@{commit}", tmp_path / "hub", tmp_path)
        environment = {"HF_HOME": tmp_path / "home", "HF_HUB_DISABLE_XET": int(transport == "lfs")}
        stranger(ONLINE, *there, HF_ENDPOINT=double.endpoint, **environment)
        assert any("/v1/xorbs/" in path for path in double.asked()) == (transport == "xet")
        through_olah = OLAH and transport == "lfs"  # it does not find what was uploaded through Xet
        if through_olah:
            with olah_before(double, tmp_path / "olah") as endpoint:
                home = {**environment, "HF_HOME": tmp_path / "home of olah"}
                stranger(MIRRORED, *there, HF_ENDPOINT=endpoint, **home)
    stranger(OFFLINE, *there, HF_HUB_OFFLINE=1, **environment)
    for way in ("online", "offline", "local", *(["mirrored"] if through_olah else [])):
        assert_trained(finished[0], tmp_path / f"{way}.safetensors")
    call(monkeypatch, hub_cli.main, "verify", tmp_path / "hub")


@pytest.mark.slow
def test_from_a_run_to_a_local_hub(finished, run_publish, tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    monkeypatch.setenv("MEDMIM_HUB", "")  # which --hub sets, for this process
    assert "nothing was sent" in run_publish("--hub", folder, "--dry-run")
    assert not folder.exists()
    commit = commit_in(run_publish("--hub", folder, "--version", "v1"))
    version = folder / REPO / "snapshots" / commit
    assert sorted(path.name for path in version.iterdir()) == sorted([*FILES, "SHA256SUMS"])
    assert (folder / REPO / "tags" / "v1").read_text() == f"{commit}\n"
    model = medmim.create_model(f"hf-hub:{REPO}@v1", pretrained=True)
    save_file(model.state_dict(), tmp_path / "loaded.safetensors")
    assert_trained(finished[0], tmp_path / "loaded.safetensors")
