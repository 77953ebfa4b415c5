"""Copies of models for a site without a hub, and the check that weights are still what was published."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import medmim
from fakes import RECORD, save_tiny, tiny_decoder, tiny_model
from hubdouble import HubDouble
from medmim import hub, verified
from medmim.access import HubAccess
from medmim.errors import UnknownModelError, WeightsError
from medmim.files import sha256_of
from medmim.localhub import LocalHub
from medmim.mirror import mirror
from medmim.publish import save_with_golden
from medmim.remote import Repository
from medmim.verify import Check, installed, models_in, verify

REPO = "org/tiny.fake"


@pytest.fixture
def folder(tmp_path):
    """A model folder with everything."""
    model = tiny_model()
    save_with_golden(model, tmp_path / "model", decoder=tiny_decoder(model), weights=RECORD)
    (tmp_path / "model" / "README.md").write_text("# A card")
    return tmp_path / "model"


@pytest.fixture
def double(folder):
    """The Hub with that model."""
    with HubDouble() as double:
        double.add_folder(REPO, folder)
        yield double


@pytest.fixture
def access(double, tmp_path):
    """The way to it, with an empty cache."""
    return HubAccess(endpoint=double.endpoint, cache_dir=tmp_path / "cache")


@pytest.fixture
def commit(double):
    return double.repos[REPO].branches["main"]


def faults(name, access=None):
    return {check.item: check.fault for check in verify(name, access=access) if check.fault}


# --- mirror -----------------------------------------------------------------------------------------------------------


def test_what_is_mirrored_has_the_same_name_commit_and_bytes(double, access, commit, folder, tmp_path, monkeypatch):
    double.repos[REPO].tags["v1"] = commit
    version = mirror(f"hf-hub:{REPO}@v1", tmp_path / "hub", access=access)
    assert (version.repo, version.name) == (REPO, commit)
    copied = {path.name: path.read_bytes() for path in version.folder.iterdir() if path.name != "SHA256SUMS"}
    assert copied == {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setenv("MEDMIM_HUB", str(tmp_path / "hub"))
    double.requests.clear()
    for name in (REPO, f"{REPO}@{commit}", f"{REPO}@v1", f"{REPO}@main"):
        model = medmim.create_model(f"hf-hub:{name}", pretrained=True)
        assert torch.equal(model.norm.weight, tiny_model().norm.weight)
        assert (model.spec.weights.repo, model.spec.weights.revision) == (REPO, commit)
    assert not double.requests


def test_an_old_revision_leaves_main_where_it_is(double, access, commit, folder, tmp_path):
    (folder / "README.md").write_text("# A newer card")
    double.add_folder(REPO, folder)
    newest = double.repos[REPO].branches["main"]
    assert newest != commit
    local = LocalHub(tmp_path / "hub")
    mirror(f"hf-hub:{REPO}@{commit}", local.root, access=access)
    assert local.head(REPO) == commit  # the only one is the newest
    mirror(f"hf-hub:{REPO}", local.root, access=access)
    assert mirror(f"hf-hub:{REPO}@{commit}", local.root, access=access).name == commit
    assert local.head(REPO) == newest


def test_weights_of_the_catalog_are_found_in_the_mirror(double, access, commit, tmp_path, monkeypatch, registry):
    published = medmim.create_model(f"hf-hub:{REPO}", pretrained=True, endpoint=double.endpoint).spec
    registry.register_model("tiny", family="vit", args=published.args, weights=[published.weights])
    assert mirror("tiny", tmp_path / "hub", access=access).name == commit
    assert mirror("tiny.fake", tmp_path / "hub", access=access).name == commit
    monkeypatch.setenv("MEDMIM_HUB", str(tmp_path / "hub"))
    double.repos.clear()
    medmim.create_decoder(medmim.create_model("tiny", pretrained=True))
    assert mirror("tiny", tmp_path / "next").name == commit


def test_weights_that_ship_go_under_the_name_that_a_wheel_without_them_looks_for(tiny_weights, tmp_path, monkeypatch):
    version = mirror("tiny", tmp_path / "hub")
    assert version.repo == "medmim/tiny.fake"
    shutil.rmtree(hub.PACKAGED / "tiny.fake")
    monkeypatch.setenv("MEDMIM_HUB", str(tmp_path / "hub"))
    medmim.create_model("tiny", pretrained=True)


def test_a_damaged_download_is_not_mirrored(double, access, tmp_path):
    double.fault("GET", "model.safetensors", times=99, flip=True)
    with pytest.raises(WeightsError, match="is not the file that was published"):
        mirror(f"hf-hub:{REPO}", tmp_path / "hub", access=access)
    assert not list((tmp_path / "hub").glob("*/*/snapshots/*"))


def test_a_mirror_is_mended_by_mirroring_again(access, tmp_path):
    path = mirror(f"hf-hub:{REPO}", tmp_path / "hub", access=access).folder / "README.md"
    path.write_text("other")
    assert mirror(f"hf-hub:{REPO}", tmp_path / "hub", access=access).folder == path.parent
    assert path.read_text() == "# A card"


def test_what_cannot_be_mirrored(tmp_path, folder):
    with pytest.raises(WeightsError, match=rf"`medmim push {folder} ORG/NAME --hub {tmp_path}/hub` gives it one"):
        mirror(f"local-dir:{folder}", tmp_path / "hub")
    with pytest.raises(UnknownModelError):
        mirror("vit_x", tmp_path / "hub")
    with pytest.raises(WeightsError, match="has no weights yet"):
        mirror("vit_l_mae3d", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


# --- verify -----------------------------------------------------------------------------------------------------------


def test_everything_that_has_a_digest_is_hashed_and_the_model_run(folder):
    assert list(verify(f"local-dir:{folder}")) == [
        Check(item, None)
        for item in ("model.safetensors", "decoder.safetensors", "golden.safetensors", "golden outputs")
    ]


def test_in_a_local_hub_the_rest_is_hashed_too(access, tmp_path):
    version = mirror(f"hf-hub:{REPO}", tmp_path / "hub", access=access)
    (name,) = models_in(tmp_path / "hub")
    assert {check.item for check in verify(name)} == {
        *(path.name for path in version.folder.iterdir() if path.name != "SHA256SUMS"),
        "golden outputs",
    }
    (version.folder / "README.md").write_text("other")
    (version.folder / "golden.safetensors").unlink()
    found = faults(name)
    assert found.keys() == {"README.md", "golden.safetensors"}
    assert found["golden.safetensors"] == "is missing"


@pytest.mark.parametrize("item", ["model.safetensors", "decoder.safetensors", "golden.safetensors"])
def test_a_byte_that_a_disk_flipped_is_found_whatever_is_noted(access, item, monkeypatch):
    monkeypatch.setattr(verified, "WORTH_NOTING", 0)
    monkeypatch.setattr(verified, "_state_of", lambda path: "as it was")
    name = f"hf-hub:{REPO}"
    assert not faults(name, access)
    path = Repository(REPO, access=access).find(item)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert Repository(REPO, access=access).find(item) == path
    found = faults(name, access)
    assert found.keys() == {item}
    assert sha256_of(path) in found[item]


def test_a_model_that_computes_something_else_is_found(folder):
    golden = load_file(folder / "golden.safetensors")
    golden["pooled"] += 0.1
    save_file(golden, folder / "golden.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["weights"]["golden"] = hub.describe_file(folder, "golden.safetensors").to_data()
    (folder / "config.json").write_text(json.dumps(config))
    assert faults(f"local-dir:{folder}") == {"golden outputs": "pooled is off by up to 0.1"}


def test_a_model_that_cannot_be_built_is_found(folder):
    config = json.loads((folder / "config.json").read_text())
    config["args"]["embed_dim"] = 96
    (folder / "config.json").write_text(json.dumps(config))
    assert "does not fit the model" in faults(f"local-dir:{folder}")["golden outputs"]


def test_without_digests_nothing_is_called_right(tmp_path):
    medmim.save_pretrained(tiny_model(), tmp_path)
    with pytest.raises(WeightsError, match="was saved without digests, so nothing can be verified"):
        list(verify(f"local-dir:{tmp_path}"))


def test_what_is_in_a_folder(folder, tmp_path):
    assert models_in(folder) == [f"local-dir:{folder}"]
    with pytest.raises(WeightsError, match="neither a model folder nor a local hub"):
        models_in(tmp_path)


def test_what_is_installed(tiny_weights, tmp_path, monkeypatch):
    assert "tiny.fake" in installed()
    version = mirror("tiny", tmp_path / "hub")
    monkeypatch.setenv("MEDMIM_HUB", str(tmp_path / "hub"))
    assert installed()[-1] == f"local-dir:{version.folder}"


def test_golden_outputs_are_those_of_a_folder_without_a_decoder_too(tmp_path):
    save_tiny(tmp_path / "bare")
    assert [check.item for check in verify(f"local-dir:{tmp_path / 'bare'}")] == [
        "model.safetensors",
        "decoder.safetensors",
    ]
    save_with_golden(tiny_model(), tmp_path / "golden", weights=RECORD)
    assert [check.item for check in verify(f"local-dir:{tmp_path / 'golden'}")][-1] == "golden outputs"
